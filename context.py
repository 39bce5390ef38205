"""Memory, past, new: all that the network sees besides noise."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import camera

NULL_MOUSE, NULL_KEY = 1.0, -1.0  # "no action": memory tokens and the guidance branch
ACTIONS_SEEN = 12  # per latent: the four that made its frames, eight before
ENCODINGS = ("anchored", "absolute", "none", "released")  # of rays
LENGTHS = (10, 5, 2)  # new latents of a segment that our own models are trained for


def query_offsets(new: int, memory: int) -> list[int]:
    """Memory slot j asks this many latents before the newest: 0 2 4 6 8 for 10 new latents and 5 slots."""
    return [slot * new // memory for slot in range(memory)]


@dataclass(frozen=True)
class Window:
    """Every number of time. Latent 0 is frame 0 alone; latent L >= 1 covers frames 4L-3 .. 4L."""

    stride: int = 4  # pixel frames per latent after the first
    first: int = 15  # latents of segment 0: the image and 14 new ones
    past: int = 4  # clean latents every later segment starts from
    new: int = 10  # latents every later segment adds
    memory: int = 5  # retrieved latents

    def latents(self, segments: int) -> int:
        return self.first + self.new * (segments - 1)

    def frames(self, segments: int) -> int:
        return self.stride * (self.latents(segments) - 1) + 1

    def latent_of(self, frame: int) -> int:
        return (frame - 1) // self.stride + 1

    def frames_of(self, latent: int) -> range:
        return (
            range(1)
            if latent == 0
            else range(self.stride * (latent - 1) + 1, self.stride * latent + 1)
        )

    def segment(self, k: int) -> tuple[int, int, int]:
        """First latent, last latent + 1, how many of them are clean past."""
        end = self.latents(k + 1)
        return (0, end, 1) if k == 0 else (end - self.new - self.past, end, self.past)

    def queries(self, k: int) -> list[int]:
        """Latents whose last frames ask for memory, spread over the new ones: end-1, -3, -5, -7, -9."""
        return [self.segment(k)[1] - 1 - offset for offset in query_offsets(self.new, self.memory)]


def take_frames(x: Tensor, first_latent: int | Tensor, n: int, steps: Tensor) -> Tensor:
    """Frames 4L + step of x (B, F, ...) for each of n latents: (B, n, S, ...), clamped at frame 0, never past the end."""
    latents = torch.as_tensor(first_latent, device=x.device).expand(len(x))[:, None] + torch.arange(
        n, device=x.device
    )
    frames = Window.stride * latents[..., None] + steps.to(x.device)
    if int(frames.max()) >= x.shape[1] or int(latents.min()) < 0:
        raise ValueError(
            f"the clip has frames 0 .. {x.shape[1] - 1}, but latents {int(latents.min())} .. "
            f"{int(latents.max())} need frames up to {int(frames.max())}"
        )
    return x[torch.arange(len(x), device=x.device)[:, None, None], frames.clamp(min=0)]


def segment_cameras(c2w: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, 4, 4) from global frame 0, an int or (B,) -> (B, n, 4, 4, 4): the cameras of each latent's four
    frames, of which [:, :, -1] is the latent's pose. Latent 0 has frame 0 four times."""
    return take_frames(c2w, first_latent, n, torch.arange(-Window.stride + 1, 1))


def action_windows(actions: Tensor, first_latent: int | Tensor, n: int) -> Tensor:
    """(B, F, A) from global frame 0 -> (B, n, 12, A): latent L sees actions 4L−12 .. 4L−1, the four that made its
    frames and the eight before, clamped at 0."""
    return take_frames(actions, first_latent, n, torch.arange(-ACTIONS_SEEN, 0))


def released_windows(actions: Tensor) -> Tensor:  # (B, 57 | 56, A) -> (B, 15 | 14, 12, A)
    """Of one segment: 12 copies of its own first action in front of 4k+1 frames, 8 in front of 4k."""
    fill = ACTIONS_SEEN if actions.shape[1] % Window.stride == 1 else ACTIONS_SEEN - Window.stride
    padded = torch.cat([actions[:, :1].expand(-1, fill, -1), actions], 1)
    return padded.unfold(1, ACTIONS_SEEN, Window.stride)[
        :, : (actions.shape[1] + 3) // Window.stride
    ].mT


def palindrome(frames: int) -> Tensor:  # (F,) long: which frame to show, F = 4k+1
    """n, n, n−1 … n/2+1, n/2+1 … n: the second half revisits, backwards, what the first half showed."""
    if frames % 4 != 1 or frames < 5:
        raise ValueError(f"a palindrome needs 4k+1 frames, at least 5, got {frames}")
    last = torch.arange((frames - 1) // 2 + 1, frames)
    return torch.cat([last[-1:], last.flip(0), last])


@dataclass(frozen=True)
class Memory:
    """Retrieved latents."""

    latents: Tensor  # (B, C, M, h, w)
    times: Tensor  # (B, M) long, absolute latent indices, any order
    cameras: Tensor  # (B, M, 4, 4, 4) c2w of each latent's four frames


@dataclass(frozen=True)
class Context:
    """[memory | past | new] on every time axis; the noisy new latents themselves travel separately."""

    past: Tensor  # (B, C, P, h, w)
    memory: Tensor  # (B, C, M, h, w), M may be 0
    times: Tensor  # (B, M+P+N) long
    rays: Tensor  # (B, R, M+P+N, h, w)
    mouse: Tensor  # (B, M+P+N, 12, 2)
    keyboard: Tensor  # (B, M+P+N, 12, 6)
    text: Tensor  # (B, n, text_dim)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Context":
        every = {field.name: getattr(self, field.name) for field in fields(self)}  # times stay long
        return Context(
            **{
                name: x.to(device, dtype if x.is_floating_point() else None)
                for name, x in every.items()
            }
        )

    def drop_memory(self) -> "Context":
        M = self.memory.shape[2]
        return replace(
            self,
            memory=self.memory[:, :, :0],
            times=self.times[:, M:],
            rays=self.rays[:, :, M:],
            mouse=self.mouse[:, M:],
            keyboard=self.keyboard[:, M:],
        )

    def alone(self) -> "Context":
        """The new latents and their cameras, without anything that came before, text or actions."""
        T = self.times.shape[1] - self.memory.shape[2] - self.past.shape[2]
        bare = replace(
            self,
            memory=self.memory[:, :, :0],
            past=self.past[:, :, :0],
            times=self.times[:, -T:],
            rays=self.rays[:, :, -T:],
            mouse=self.mouse[:, -T:],
            keyboard=self.keyboard[:, -T:],
        )
        return bare.mute(torch.ones(len(self.past), dtype=torch.bool))

    def mute(self, where: Tensor) -> "Context":  # (B,) bool
        """Null actions, zero text for some samples: so training learns the branch guidance subtracts."""
        B, where = len(where), where.to(self.text.device)
        mouse = torch.where(where.view(B, 1, 1, 1), NULL_MOUSE, self.mouse)
        keyboard = torch.where(where.view(B, 1, 1, 1), NULL_KEY, self.keyboard)
        return replace(
            self,
            mouse=mouse,
            keyboard=keyboard,
            text=torch.where(where.view(B, 1, 1), 0.0, self.text),
        )

    def null(self, text: Tensor | None = None) -> "Context":
        """The branch guidance subtracts: no memory, null actions, the negative prompt (zeros if none)."""
        bare = self.drop_memory().mute(torch.ones(len(self.past), dtype=torch.bool))
        return bare if text is None else replace(bare, text=text)


def released_rays(
    cameras: Tensor, M: int, new: int, K: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """(B, M+T, 4, 4, 4), M memory latents first and `new` new ones last, K (4,) in pixels, size = latent h, w
    and pixels per cell -> (B, 6*stride², M+T, h, w) float32."""
    (h, w, stride), pose, T = (
        size,
        camera.to_released(cameras[:, :, -1].double()),
        cameras.shape[1] - M,
    )
    # past and new latents:  g_i = c2w_{i−1}⁻¹ c2w_i,  g_0 = I;   memory:  g_j = c2w_query(j)⁻¹ c2w_j
    base = [M + T - 1 - offset for offset in query_offsets(new, M)] + [M, *range(M, M + T - 1)]
    g = camera.relative(pose[:, base], pose)
    # t / |t| of memory, t / max |t| of the segment; below 0.1 mm a direction would be rounding noise
    length = g[..., :3, 3].norm(dim=-1)
    length[:, M:] = length[:, M:].amax(1, keepdim=True)
    g[..., :3, 3] /= torch.where(length > 1e-4, length, 1.0)[..., None]
    # (c, h s, w s) -> (c, row in cell, column in cell, h, w): the order the released weights expect
    cells = (
        camera.rays(g.float(), K, h * stride, w * stride)
        .unflatten(-1, (w, stride))
        .unflatten(-3, (h, stride))
    )
    return cells.movedim((-3, -1), (-4, -3)).flatten(2, 4).transpose(1, 2)


def make_context(
    past: Tensor,  # (B, C, P, h, w) clean latents
    times: Tensor,  # (B, P+N) long, absolute latent indices
    cameras: Tensor,  # (B, P+N, 4, 4, 4) c2w, see segment_cameras
    mouse: Tensor,  # (B, P+N, 12, 2), see action_windows
    keyboard: Tensor,  # (B, P+N, 12, 6)
    text: Tensor,  # (B, n, text_dim)
    memory: Memory | None = None,
    encoding: str = "anchored",
    stride: int = 8,  # pixels per latent cell
    K: Tensor | None = None,  # (4,) pixels; anchored also (B, 4); default 90° (released: both ways)
) -> Context:
    """The ONE place where a context is put together: training, distillation, play and evaluation call it."""
    memory = Memory(past[:, :, :0], times[:, :0], cameras[:, :0]) if memory is None else memory
    (B, C, P, h, w), T, M = past.shape, times.shape[1], memory.latents.shape[2]
    for name, x, shape in (
        ("times", times, (B, T)),
        ("cameras", cameras, (B, T, 4, 4, 4)),
        ("text", text, (B, *text.shape[-2:])),
        ("mouse", mouse, (B, T, ACTIONS_SEEN, 2)),
        ("keyboard", keyboard, (B, T, ACTIONS_SEEN, 6)),
        ("memory.latents", memory.latents, (B, C, M, h, w)),
        ("memory.times", memory.times, (B, M)),
        ("memory.cameras", memory.cameras, (B, M, 4, 4, 4)),
    ):
        camera.expect(name, x, shape)
    anchor, cameras = cameras[:, P - 1, -1], torch.cat([memory.cameras.to(cameras), cameras], 1)
    camera.check_rigid("cameras (memory first)", cameras)
    if camera.choose("encoding", encoding, ENCODINGS) == "released":
        image = released_rays(
            cameras,
            M,
            T - P,
            torch.tensor([w, h, w, h]) * stride / 2 if K is None else K,
            (h, w, stride),
        )
    else:
        anchor = torch.eye(4).to(anchor).expand_as(anchor) if encoding == "absolute" else anchor
        image = camera.anchored_rays(
            cameras, anchor, camera.intrinsics(h, w) if K is None else K / stride, h, w
        ) * (encoding != "none")
    times = torch.cat([memory.times.to(times), times], 1)
    mouse = torch.cat([mouse.new_full((B, M, ACTIONS_SEEN, 2), NULL_MOUSE), mouse], 1)
    keyboard = torch.cat([keyboard.new_full((B, M, ACTIONS_SEEN, 6), NULL_KEY), keyboard], 1)
    return Context(
        past, memory.latents.to(past), times, image.to(past.device), mouse, keyboard, text
    )


def clip_context(
    latents: Tensor,
    c2w: Tensor,
    keyboard: Tensor,
    mouse: Tensor,
    text: Tensor,  # whole clips, see below
    start: Tensor,  # (B,) long: the first NEW latent of each sample
    n_new: int,
    n_past: int,
    memory_index: Tensor | None = None,  # (B, M) long: latents to remember
    encoding: str = "anchored",
    stride: int = 8,
    K: Tensor | None = None,
) -> tuple[Tensor, Context]:  # x0 (B, C, N, h, w) and its context
    """Cut a training or evaluation window out of whole clips: latents (B, C, T, h, w), cameras and actions of every
    frame (B, F, 4, 4), (B, F, 6), (B, F, 2), all from frame 0, and text (B, n, text_dim)."""
    first, T = start.to(latents.device) - n_past, n_past + n_new
    if int(first.min()) < 0 or int(first.max()) + T > latents.shape[2]:
        raise ValueError(
            f"start must lie in {n_past} .. {latents.shape[2] - n_new} for {n_past} past and {n_new} "
            f"new latents in a clip of {latents.shape[2]}, got {start.tolist()}"
        )
    rows = torch.arange(len(first), device=first.device)[:, None]
    times = first[:, None] + torch.arange(T, device=first.device)
    window, memory = latents.transpose(1, 2)[rows, times].transpose(1, 2), None
    if memory_index is not None:
        index = memory_index.to(first.device)
        seen = torch.cat(
            [segment_cameras(c2w, latent, 1) for latent in index.to(c2w.device).unbind(1)], 1
        )
        memory = Memory(latents.transpose(1, 2)[rows, index].transpose(1, 2), index, seen)
    context = make_context(
        window[:, :, :n_past],
        times,
        segment_cameras(c2w, first, T),
        action_windows(mouse, first, T),
        action_windows(keyboard, first, T),
        text,
        memory,
        encoding,
        stride,
        K,
    )
    return window[:, :, n_past:], context
