"""Memory, past, new: all that the network sees besides noise.

What it does. Video is made in segments, and a segment in latents: small tensors that the VAE turns
into frames. The network gets noise in the place of the new latents, and beside it a context: the
last clean latents before them (past), five older ones that memory.py found (memory), and for
every latent its index in time, its cameras and its actions. Training, distillation, play and
evaluation build this context here and nowhere else.

Time. Latent 0 holds frame 0 alone, every later latent holds four frames (vae.py has the reason):

    latents    0 |    1    |    2    | 3 ...
    frames     0 | 1 2 3 4 | 5 6 7 8 | 9 ...

    latent L >= 1 holds the frames 4L − 3 .. 4L                                                (1)

A segment is [past | new], and only its new latents are made:

    segment 0      [0 | 1 .. 14]               the image is its past: 57 frames with it
    segment 1      [11 .. 14 | 15 .. 24]       4 past, 10 new: 40 frames more
    segment 2      [21 .. 24 | 25 .. 34]       and so on

A key acts from the next segment on. Our own models are therefore trained for 5 and 2 new latents as
well: the shorter the segment, the sooner the key acts. Segment 0 has 14 in any case.

Sequence. Attention runs over [memory | past | new] as ONE sequence. Memory and past are clean, are
told noise level 0 and carry no loss; only the new latents are noisy. The network tells old latents
from new ones by that level (block.py), by their time (attention.py) and their camera (camera.py).

Memory. A memory slot holds the answer to one query. The query is the camera of a new latent, the
answer an old latent that saw much of the same (memory.py). Queries are spread over the segment, so
that what comes into view late is asked for too. (Where the last slot is kept for the oldest latent,
its query goes unanswered.) Of 10 new latents, the newest asks and those 2, 4, 6 and 8 before it; of
N new latents, with M slots:

    the query of slot j lies ⌊j·N/M⌋ latents before the newest,    j = 0 .. M − 1              (2)

Actions. action[f] leads from frame f to f + 1, so the frames of latent L were made by the actions
4L − 4 .. 4L − 1. The latent sees these and the eight before them, which show what has just begun or
stopped; where there are none yet, action 0 stands in:

    latent L sees the actions 4L − 12 .. 4L − 1                                                (3)

Guidance (flow.sample) needs a second prediction, made without being told what is special here: no
memory, null actions (mouse +1, keyboard −1, as released), and the negative prompt or zeros for
text. Past and cameras stay, so guidance does not strengthen those. Training does the same to the
actions and text of some samples (mute), so that the network has learned to answer. Memory latents
always carry null actions.

What differs. Released weights expect other windows of actions and other rays: released.py has both,
and a context with the encoding "released" is made of them.

Try it: python context.py      Tests: pytest tests/test_context.py tests/test_memory.py
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import camera
import released
from camera import choose, expect

NULL_MOUSE = 1.0  # "no action": memory tokens and the branch that guidance subtracts
NULL_KEY = -1.0
ACTIONS_SEEN = 12  # per latent
ENCODINGS = ("anchored", "absolute", "none", "released")  # of cameras, see Segment.rays_of
LENGTHS = (10, 5, 2)  # new latents of a segment that our own models are trained for


# ---- time ----------------------------------------------------------------------------------------


def query_offsets(new: int, memory: int) -> list[int]:
    """For every memory slot, how far before the newest latent its query lies: 0 2 4 6 8 of 10 new."""
    return [slot * new // memory for slot in range(memory)]  # (2)


@dataclass(frozen=True)
class Window:
    """Which frames make a latent, and which latents a segment."""

    stride: int = 4  # pixel frames per latent after the first
    first: int = 15  # latents of segment 0: the image and 14 new ones
    past: int = 4  # clean latents every later segment starts from
    new: int = 10  # latents every later segment adds
    memory: int = 5  # retrieved latents

    def latents(self, segments: int) -> int:
        """How many there are when so many segments are made."""
        return self.first + self.new * (segments - 1)

    def frames(self, segments: int) -> int:
        return self.stride * (self.latents(segments) - 1) + 1

    def latent_of(self, frame: int) -> int:
        return (frame - 1) // self.stride + 1

    def frames_of(self, latent: int) -> range:
        if latent == 0:
            return range(1)
        return range(self.stride * (latent - 1) + 1, self.stride * latent + 1)  # (1)

    def segment(self, k: int) -> tuple[int, int, int]:
        """First latent, last latent + 1, how many of them are clean past."""
        end = self.latents(k + 1)
        if k == 0:
            return 0, end, 1
        return end - self.new - self.past, end, self.past

    def queries(self, k: int) -> list[int]:
        """Latents whose last frames ask for memory, newest first."""
        newest = self.segment(k)[1] - 1
        return [newest - offset for offset in query_offsets(self.new, self.memory)]


def take_frames(x: Tensor, first_latent: int | Tensor, n: int, steps: Tensor) -> Tensor:
    """Entries 4L + step of x (B, F, ...), for n latents L and S steps: (B, n, S, ...).

    Before entry 0, entry 0 is repeated; to ask for more than there is, is an error.
    """
    first = torch.as_tensor(first_latent, device=x.device).expand(len(x))
    latents = first[:, None] + torch.arange(n, device=x.device)  # (B, n)
    frames = Window.stride * latents[..., None] + steps.to(x.device)  # (B, n, S)
    if int(frames.max()) >= x.shape[1] or int(latents.min()) < 0:
        raise ValueError(
            f"the clip has frames 0 .. {x.shape[1] - 1}, but latents {int(latents.min())} .. "
            f"{int(latents.max())} need frames up to {int(frames.max())}"
        )
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return x[rows, frames.clamp(min=0)]


def segment_cameras(c2w: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, 4, 4) from frame 0 -> (B, n, 4, 4, 4): the cameras of each latent's four frames.

    first_latent is an int or (B,). The last of the four, [:, :, -1], is the latent's own pose.
    Latent 0 has frame 0 four times.
    """
    return take_frames(c2w, first_latent, n, torch.arange(1 - Window.stride, 1))  # (1)


def action_windows(actions: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, A) from frame 0, A = 6 keys or 2 of the mouse -> (B, n, 12, A) what each latent sees."""
    return take_frames(actions, first_latent, n, torch.arange(-ACTIONS_SEEN, 0))  # (3)


# ---- what goes into a context --------------------------------------------------------------------


@dataclass(frozen=True)
class Lens:
    """How cameras are told to the network."""

    encoding: str = "anchored"  # one of ENCODINGS
    stride: int = 8  # pixels per latent cell
    # intrinsics in pixels: (4,), or (B, 4) if anchored; None: 90° across, if released 90° down too
    K: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """Retrieved latents."""

    latents: Tensor  # (B, C, M, h, w)
    times: Tensor  # (B, M) long, absolute latent indices, any order
    cameras: Tensor  # (B, M, 4, 4, 4) c2w of each latent's four frames


@dataclass(frozen=True)
class Context:
    """What the network is told about M memory, P past and N new latents, always in this order.

    The noisy new latents themselves are not part of it: they change from step to step.
    """

    past: Tensor  # (B, C, P, h, w)
    memory: Tensor  # (B, C, M, h, w), M may be 0
    times: Tensor  # (B, M+P+N) long, absolute latent indices
    rays: Tensor  # (B, R, M+P+N, h, w), R numbers per cell: 60 if anchored, 6·stride² if released
    mouse: Tensor  # (B, M+P+N, 12, 2)
    keyboard: Tensor  # (B, M+P+N, 12, 6)
    text: Tensor  # (B, n, text_dim), n words
    null_text: Tensor  # (B, n, text_dim) what guidance subtracts: the negative prompt, or zeros

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Context":
        """Elsewhere or in another precision; times stay integers."""
        moved = {}
        for field in fields(self):
            x = getattr(self, field.name)
            moved[field.name] = x.to(device, dtype if x.is_floating_point() else None)
        return Context(**moved)

    def forget_first(self, count: int) -> "Context":
        """Without times, rays and actions of the first latents; the caller drops the latents."""
        return replace(
            self,
            times=self.times[:, count:],
            rays=self.rays[:, :, count:],
            mouse=self.mouse[:, count:],
            keyboard=self.keyboard[:, count:],
        )

    def drop_memory(self) -> "Context":
        shorter = self.forget_first(self.memory.shape[2])
        return replace(shorter, memory=self.memory[:, :, :0])

    def alone(self) -> "Context":
        """Times and cameras of the new latents: no memory, no past, no actions, no text."""
        bare = self.drop_memory()
        bare = bare.forget_first(self.past.shape[2])
        bare = replace(bare, past=self.past[:, :, :0])
        return bare.mute(torch.ones(len(self.past), dtype=torch.bool))

    def mute(self, where: Tensor) -> "Context":  # (B,) bool
        """Null actions and zero text where a sample is marked, so that guidance has been learned."""
        where = where.to(self.text.device)
        muted = where.view(-1, 1, 1, 1)
        return replace(
            self,
            mouse=torch.where(muted, NULL_MOUSE, self.mouse),
            keyboard=torch.where(muted, NULL_KEY, self.keyboard),
            text=torch.where(where.view(-1, 1, 1), 0.0, self.text),
        )

    def null(self) -> "Context":
        """What guidance compares with: no memory, null actions, the negative prompt or zeros."""
        everyone = torch.ones(len(self.past), dtype=torch.bool)
        bare = self.drop_memory().mute(everyone)
        return replace(bare, text=self.null_text)


@dataclass(frozen=True)
class Segment:
    """Where a player goes while a segment is made: its past latents first, then the new ones."""

    times: Tensor  # (B, P+N) long, absolute latent indices
    cameras: Tensor  # (B, P+N, 4, 4, 4) c2w of each latent's four frames
    mouse: Tensor  # (B, P+N, 12, 2) the actions that each latent sees
    keyboard: Tensor  # (B, P+N, 12, 6)

    def __post_init__(self) -> None:
        B, T = self.mouse.shape[:2]
        expect("times", self.times, (B, T))
        expect("cameras", self.cameras, (B, T, Window.stride, 4, 4))
        expect("mouse", self.mouse, (B, T, ACTIONS_SEEN, 2))
        expect("keyboard", self.keyboard, (B, T, ACTIONS_SEEN, 6))

    @classmethod
    def cut(
        cls,
        walk: object,  # from frame 0: c2w (B, F, 4, 4), keyboard (B, F, 6), mouse (B, F, 2)
        first: int | Tensor,  # its first latent, an int or (B,)
        n: int,  # how many latents
        encoding: str = "anchored",
    ) -> "Segment":
        """n latents out of whole walks."""
        windows = released.action_windows if encoding == "released" else action_windows
        start = torch.as_tensor(first).expand(len(walk.c2w))
        return cls(
            times=start[:, None] + torch.arange(n, device=start.device),
            cameras=segment_cameras(walk.c2w, first, n),
            mouse=windows(walk.mouse, first, n),
            keyboard=windows(walk.keyboard, first, n),
        )

    def asking(self, new: int, slots: int = Window.memory) -> Tensor:
        """(B, M, 4, 4): the cameras of the new latents that ask for memory, newest first."""
        newest = self.times.shape[1] - 1
        queries = [newest - offset for offset in query_offsets(new, slots)]
        return self.cameras[:, queries, -1]

    def context(
        self,
        past: Tensor,  # (B, C, P, h, w) clean latents
        text: Tensor,  # (B, n, text_dim)
        memory: Memory | None = None,
        lens: Lens = Lens(),
    ) -> Context:
        """The ONE place where a context is put together; memory None: M = 0."""
        B, C, P, h, w = past.shape
        if memory is None:
            memory = Memory(
                latents=past[:, :, :0],
                times=self.times[:, :0],
                cameras=self.cameras[:, :0],
            )
        M = memory.latents.shape[2]
        expect("times", self.times, (B, self.times.shape[1]))
        expect("text", text, (B, *text.shape[-2:]))
        expect("memory.latents", memory.latents, (B, C, M, h, w))
        expect("memory.times", memory.times, (B, M))
        expect("memory.cameras", memory.cameras, (B, M, Window.stride, 4, 4))

        cameras = torch.cat([memory.cameras.to(self.cameras), self.cameras], 1)
        camera.check_rigid("cameras (memory first)", cameras)
        rays = self.rays_of(cameras, P, (h, w), lens)

        # memory tokens have times and cameras of their own, and no actions
        no_turn = self.mouse.new_full((B, M, ACTIONS_SEEN, 2), NULL_MOUSE)
        no_key = self.keyboard.new_full((B, M, ACTIONS_SEEN, 6), NULL_KEY)
        return Context(
            past=past,
            memory=memory.latents.to(past),
            times=torch.cat([memory.times.to(self.times), self.times], 1),
            rays=rays.to(past.device),
            mouse=torch.cat([no_turn, self.mouse], 1),
            keyboard=torch.cat([no_key, self.keyboard], 1),
            text=text,
            null_text=torch.zeros_like(text),
        )

    def rays_of(self, cameras: Tensor, P: int, size: tuple[int, int], lens: Lens) -> Tensor:
        """(B, M+P+N, 4, 4, 4) -> (B, R, M+P+N, h, w): cameras as the network was trained to see them.

        anchored: relative to the last past frame. absolute: as they are. none: zeros, an ablation.
        """
        h, w = size
        T = self.times.shape[1]
        choose("encoding", lens.encoding, ENCODINGS)
        if lens.encoding == "released":
            K = lens.K
            if K is None:
                K = torch.tensor([w, h, w, h]) * lens.stride / 2
            newest = cameras.shape[1] - 1
            offsets = query_offsets(T - P, newest + 1 - T)
            queries = [newest - offset for offset in offsets]
            return released.rays(cameras, queries, K, (h, w, lens.stride))

        anchor = self.cameras[:, P - 1, -1]  # (B, 4, 4)
        if lens.encoding == "absolute":
            anchor = torch.eye(4).to(anchor).expand_as(anchor)
        K = camera.intrinsics(h, w) if lens.K is None else lens.K / lens.stride
        rays = camera.anchored_rays(cameras, anchor, K, h, w)
        return rays * (lens.encoding != "none")


# ---- windows of whole clips ----------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Whole clips, everything from frame 0."""

    latents: Tensor  # (B, C, T, h, w)
    c2w: Tensor  # (B, F, 4, 4)
    keyboard: Tensor  # (B, F, 6)
    mouse: Tensor  # (B, F, 2)
    text: Tensor  # (B, n, text_dim)

    def window(
        self,
        start: Tensor,  # (B,) long: the first NEW latent of each sample
        n_new: int,
        n_past: int,
        remember: Tensor | None = None,  # (B, M) long: latents to remember
        lens: Lens = Lens(),
    ) -> tuple[Tensor, Context]:  # x0 (B, C, N, h, w) and its context
        """A segment of training or evaluation: the clean latents to predict, and what is told."""
        # the window must lie inside the clip, its past included
        first = start.to(self.latents.device) - n_past
        n = n_past + n_new
        stored = self.latents.shape[2]
        if int(first.min()) < 0 or int(first.max()) + n > stored:
            raise ValueError(
                f"start must lie in {n_past} .. {stored - n_new} for {n_past} past and {n_new} new "
                f"latents in a clip of {stored}, got {start.tolist()}"
            )
        segment = Segment.cut(self, first, n, lens.encoding)
        latents = self.latents_at(segment.times)
        memory = None if remember is None else self.memory_at(remember)
        context = segment.context(latents[:, :, :n_past], self.text, memory, lens)
        return latents[:, :, n_past:], context

    def latents_at(self, times: Tensor) -> Tensor:  # (B, n) -> (B, C, n, h, w)
        rows = torch.arange(len(times), device=self.latents.device)[:, None]
        by_time = self.latents.transpose(1, 2)
        return by_time[rows, times.to(self.latents.device)].transpose(1, 2)

    def memory_at(self, times: Tensor) -> Memory:  # (B, M)
        """These latents as if a bank had given them."""
        index = times.to(self.latents.device)
        columns = index.to(self.c2w.device).unbind(1)  # M tensors (B,)
        cameras = torch.cat([segment_cameras(self.c2w, column, 1) for column in columns], 1)
        return Memory(self.latents_at(index), index, cameras)


def main() -> None:
    """Every frame is made once, however long the segments are; which actions a latent sees."""
    for new in LENGTHS:
        window = Window(new=new)
        made = [0] * window.frames(4)
        for k in range(4):
            first, end, past = window.segment(k)
            made_now = range(first + past if k else first, end)
            for latent in made_now:
                for frame in window.frames_of(latent):
                    made[frame] += 1
        asking = window.queries(1)
        print(
            f"{new:2d} new: 4 segments are {len(made)} frames, each made {min(made)} to {max(made)} times;",
            end="",
        )
        print(f" segment 1 is latents {window.segment(1)[:2]}, and {asking} ask for memory")

    actions = torch.arange(200.0)[None, :, None]
    ours = action_windows(actions, 15, 1)[0, 0, :, 0]
    print(f"latent 15 sees actions {ours[0]:.0f} .. {ours[-1]:.0f}")


if __name__ == "__main__":
    main()
