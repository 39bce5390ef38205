"""Any model that draws frames, scored by the measures that need nothing but frames.

    python evaluate.py all --quick --model lab.guests:Copycat

A model is a class that is built without arguments and has two methods:

    reset(image, prompt)      Begin a new walk and forget the last one. image: (64, 64, 3) uint8, what
                              is seen now, 90 degrees across. prompt: a sentence about the place.
    step(keyboard, mouse)     Go on: (n, 6) and (n, 2) float32. Returns (n, 64, 64, 3) uint8, what is
                              seen after each of the n actions, as numpy or torch.

keyboard holds W S A D, jump and attack, 1 where a key is down: a step is 0.1235 m. mouse holds
pitch and yaw in units of 15 degrees, to the right positive. n is a multiple of 4: 56 in the first
call after a reset, 40 in every later one, as our own model makes them. Frames of another size are
the model's to resize. lab/guests.py has two examples.

It is asked for nothing else: no latents, no cameras, no bank. That has a price. Our own models are
measured behind 177 true frames, which lie in their bank. An outside model can be told one picture:
it walks every script from there by itself, and its own mistakes go with it. So compare outside
models with each other, and with our own behind the same door (lab.guests:Shipped), not with
results/*.json. Its numbers go into a file of their own, OUT/outside-MODULE-CLASS.json, which no table
reads.
"""

import contextlib
import importlib
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

import world
from engine import cli
from lab import players, revisits, truth, walks, worlds
from lab.revisits import LAST
from lab.run import Run
from lab.walks import Actions, Film
from lab.worlds import KNOWN, SCORED, Script

WHOLE = "explored, whole segments"
METHODS = {"reset": ("image", "prompt"), "step": ("keyboard", "mouse")}
NEEDS_WEIGHTS = "needs the parts of our own model"
LEFT_OUT = {  # commands that frames alone cannot answer
    "sanity": "tests the measures, and no model",
    "rivals": "puts memories of its own choice before the network",
    "drift": "begins with a bank of true frames; explore has what drifts from one picture",
    "distill": "compares our student with our base",
    "int8": NEEDS_WEIGHTS,
    "vae": NEEDS_WEIGHTS,
    "retrieval": "asks the bank which frames it would choose",
    "rope": NEEDS_WEIGHTS,
    "moe": NEEDS_WEIGHTS,
    "latency": "times our own session; explore has the model's milliseconds",
    "ablation": "compares trainings of our own network",
}


# ---- through the door ---------------------------------------------------------------------


class Guest:
    """A model behind the two methods, and what it draws."""

    def __init__(self, name: str, model: object) -> None:
        self.name = name
        self.model = model

    def step(self, keyboard: Tensor, mouse: Tensor) -> Tensor:  # (n, H, W, 3) in [0, 1]
        n = len(keyboard)
        with theirs(f"{self.name}: step"):
            frames = self.model.step(keyboard.float().numpy(), mouse.float().numpy())
        wanted = f"{(n, worlds.SIZE, worlds.SIZE, 3)} uint8"
        got = type(frames).__name__
        if isinstance(frames, ndarray | Tensor):
            got = f"{tuple(frames.shape)} {str(frames.dtype).removeprefix('torch.')}"
        if got != wanted:
            raise ValueError(
                f"{self.name}: step must return {wanted} for {n} actions, numpy or torch; got {got}"
            )
        return torch.as_tensor(frames).cpu() / 255

    def walk(self, image: ndarray, scene: world.Scene, actions: Actions) -> Tensor:
        """From a picture on, a frame for every action. The last call is filled with standing still."""
        keyboard, mouse = actions
        n = len(keyboard)
        segments = max(1, -(-(n - 16) // 40))
        ends = players.ends_of(1, segments, 10)
        still = (0, 0, 0, ends[-1] - n)  # rows of zeros, behind the last one
        keyboard = F.pad(keyboard, still)
        mouse = F.pad(mouse, still)
        with theirs(f"{self.name}: reset"):
            self.model.reset(image, world.scene_caption(scene))
        film = []
        for begin, end in pairwise([0, *ends]):
            film.append(self.step(keyboard[begin:end], mouse[begin:end]))
        return torch.cat(film)[:n]

    def draw_arms(self, script: Script, arms: Iterable[Actions]) -> Tensor:
        """As walks.draw_arms; of the known frames it is shown the last one alone."""
        start = worlds.draw(script, [KNOWN - 1]).frames[0]
        films = [self.walk(start, script.scene, (k[:40], m[:40])) for k, m in arms]
        return torch.stack(films)


def load(name: str) -> Guest:
    """MODULE:CLASS, found where python finds modules, or in the current folder."""
    module, _, wanted = name.partition(":")
    module = module.removesuffix(".py")
    if not all(part.isidentifier() for part in [*module.split("."), wanted]):
        raise ValueError(f"--model takes MODULE:CLASS, such as lab.guests:Copycat; got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with theirs(f"--model {name}"):
        found = importlib.import_module(module)
    classes = dict(inspect.getmembers(found, inspect.isclass))
    if wanted not in classes:
        raise ValueError(f"--model: {module} has no class {wanted}{near(wanted, classes)}")
    fits(name, "the class", classes[wanted])
    with theirs(f"--model {name}"):
        model = classes[wanted]()
    for method, arguments in METHODS.items():
        call = getattr(model, method, None)
        if not callable(call):
            raise ValueError(f"--model: {name} has no method {method}({', '.join(arguments)})")
        fits(name, method, call, *arguments)
    return Guest(name, model)


@contextlib.contextmanager
def theirs(where: str) -> Iterator[None]:
    """Code of somebody else: whatever it raises becomes one line that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__} {error}".strip()
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{where} raised {told} ({last.filename}:{last.lineno}; --debug shows how it came there)"
        ) from error


def near(wanted: str, classes: Iterable[str]) -> str:
    return cli.did_you_mean(wanted, classes).replace("; see --help", "")


def fits(name: str, what: str, call: Callable, *arguments: str) -> None:
    """Can it be called with so many arguments?"""
    try:
        inspect.signature(call).bind(*arguments)
    except TypeError as error:
        takes = f"({', '.join(arguments)})" if arguments else "no arguments"
        raise ValueError(f"--model: {name}: {what} must take {takes}: {error}") from error


# ---- what frames alone can say ------------------------------------------------------------


def action(run: Run, guest: Guest) -> None:
    """As `action`, from the one picture where the actions begin."""
    walks.obedience(run, guest.draw_arms)


def explore(run: Run, guest: Guest) -> None:
    """As `explore`: a picture, and a minute of walking to where nobody has been. Then what `drift`
    says of such a film, and what forty frames cost."""
    n = 40 * walks.LONG + 16
    for seed in run.worlds[:10]:
        script = worlds.journey(seed, walks.LONG)
        true = worlds.draw(script, slice(n + 1)).frames
        began = time.perf_counter()
        film = guest.walk(true[0], script.scene, (script.keyboard[:n], script.mouse[:n]))
        spent = time.perf_counter() - began
        walks.score_walk(run, "explored", film, true[1:])
        run.put("explored", {"ms per 40 frames": 40e3 * spent / n})
        walks.summarise(run, WHOLE, Film(film[16:], true[17:]))
    # "explored" says it; of a film that lacks its first 16 frames it would be another number
    for n in (256, 640):
        run.raw.pop(f"{WHOLE}/sharpness after {n}", None)


def memory(run: Run, guest: Guest) -> None:
    """Walk away from the first picture and come back, near it or to the very place.

    Forgetting is the same model that was reset on the way: it goes on from the last frame that it
    drew itself, and all that it saw before is gone. What memory is worth is the difference. The
    pixels that count most are those which the first picture showed: nothing else of the room was
    ever told.
    """
    donors = {place: revisit(run.worlds[-1], place)[1] for place in revisits.PLACES}
    for seed in run.worlds:
        for place in revisits.PLACES:
            script, views = revisit(seed, place)
            first = views.frames[0]
            images = come_back(guest, script, first)
            images["first picture held"] = np.repeat(first[None], SCORED, 0)
            if len(run.worlds) > 1:
                images["floor: other world"] = donors[place].frames[LAST]
            donors[place] = views

            shown = truth.masks(views.depth, views.c2w, LAST, 1)["seen"]
            for arm, image in images.items():
                row = f"{place}, {arm}"
                run.scores(row, image, views.frames[LAST], {"first picture": shown})


def revisit(seed: int, place: str) -> tuple[Script, worlds.Views]:
    script = worlds.revisit(seed, revisits.PLACES[place])
    return script, worlds.draw(script)


def come_back(guest: Guest, script: Script, first: ndarray) -> dict[str, Tensor | ndarray]:
    """The scored frames of a walk with all that was seen, and of one that forgets on the way."""
    film = guest.walk(first, script.scene, (script.keyboard, script.mouse))
    turned = (255 * film[KNOWN - 2]).round().byte().numpy()  # frame KNOWN - 1: frame 0 is not drawn
    rest = (script.keyboard[KNOWN - 1 :], script.mouse[KNOWN - 1 :])
    again = guest.walk(turned, script.scene, rest)
    return {"remembering": film[-SCORED:], "forgetting": again[-SCORED:]}


COMMANDS: dict[str, Callable[[Run, Guest], None]] = {
    "memory": memory,
    "explore": explore,
    "action": action,
}
