"""Where a walk begins: the model, and then a picture, or a session that goes on.

A session that ended well says its whole state. One that was cut off says it as of a moment before,
and what was played since: the same actions are walked again, and lead to the same place.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import camera
import realtime
from dataset import episode
from engine import configs
from engine.parts import SIZES, Options
from page import folder as folders
from page import link
from page.controls import LATENT
from page.game import FakeSession
from page.start import Start, open_start


def options_of(args: argparse.Namespace) -> Options:
    """The flags of play.py as the options of a session."""
    return Options(
        preset=args.preset,
        weights=args.weights,
        decoder=args.vae,
        steps=args.steps,
        guidance=args.guidance,
        new=args.new or Options.new,
        device=args.device,
        dtype=args.dtype,
        quantize="qkvo" if args.int8 else "",
        compile=args.compile,
        view=args.view,
    )


def open_walk(player: object, live: bool) -> None:
    """The player at the first picture of its walk, or at the last one of a walk that goes on."""
    args = player.args
    recorded = folders.session_of(args.resume) if args.resume else None
    if recorded:
        args.view = recorded["flags"].get("view", "first")  # a session goes on as it began

    # a picture that cannot be read is said before the model is loaded, which takes its time
    player.size = args.size if args.fake else SIZES[args.preset]
    image = Path(args.image)
    start = None if recorded else open_start(image, player.size, image.name, args.view)
    if start and live:  # something to see until the model is there
        player.show(start.image[None], [start.pose], {"keys": [], "ms": {}})

    if args.fake:
        player.session = FakeSession(args.size, args.view)
    else:
        player.session = realtime.open_session(options_of(args), args.dit_ranks)
        settle(player, live)
    player.session.policy = args.memory
    if recorded:
        go_on(player, args.resume, recorded)
    else:
        player.reset(numbered(start, image.read_bytes(), player.gallery))


def numbered(start: Start, picture: bytes, gallery: list[Path]) -> Start:
    """Which of the start pictures it is, if it is one: a link can say so."""
    same = (k for k, path in enumerate(gallery) if path.read_bytes() == picture)
    return replace(start, number=next(same, None))


def walk_link(player: object, text: str) -> None:
    """The walk of a link, from its start picture on."""
    wanted = link.parse(text, len(player.gallery), player.session.lengths)
    path = player.gallery[wanted.start]
    start = open_start(path, player.size, path.name, player.args.view)

    # with segments of another length it would be another walk
    player.seed = wanted.seed
    player.reset(replace(start, number=wanted.start), wanted.new)
    if wanted.chords:
        player.script = [rows.numpy() for rows in camera.actions_from_keys(wanted.chords)]


def link_of(player: object) -> str:
    """The way the player has come, as a link that leads the same way."""
    # a picture of one's own, or a folder that goes on: nobody else has what the walk began with
    keyboard, mouse = player.actions()
    if player.begun.number is None or len(keyboard) != player.frame:
        raise ValueError("a link can only hold walks that began with one of the start pictures")
    chords = [link.chord_of(*row) for row in zip(keyboard, mouse, strict=True)]
    new = 0 if player.args.fake else player.session.options.new
    walk = link.Walk(player.seed, player.begun.number, new, tuple(chords))
    return link.write(walk, player.session.lengths)


def settle(player: object, live: bool) -> None:
    """What was measured on this machine is written down: a replay must not measure again."""
    args = player.args
    args.dtype = player.session.options.dtype
    args.device = player.session.options.device
    if live and not args.new:
        args.new = realtime.shortest_sustained(player.session, player.fps)
    else:
        args.new = player.session.options.new
    player.own_new = args.new


def go_on(player: object, folder: Path, recorded: dict) -> None:
    """Where a saved session ended. If its state is older than its end, the rest is walked again."""
    player.seed = recorded["seed"]
    player.prompt = recorded["prompt"]
    trail = [tuple(pose) for pose in recorded["trail"] + recorded["poses"][::LATENT]]
    done = recorded.get("state", len(recorded["keyboard"]))
    if done is None and recorded["trail"]:
        raise ValueError(
            f"{folder} was cut off before its state was saved: it is a clip, nobody can go on"
        )

    # the session as it was at its first picture, and then as the state says
    image = folder / "start.png"
    first = open_start(image, player.size, image.name, player.args.view)
    player.begin(first)
    if done is not None:
        # the folder may be a stranger's
        state = folder / "state.safetensors"
        with configs.reading(state):
            if not state.is_file():
                raise ValueError("no regular file")
            player.session.restore(state)
    walk_again(player, recorded, done or 0)

    # what the player sees first is the last frame that was recorded
    last = np.array(episode.read_episode(folder).video[-1])
    note = f"{folder} goes on at frame {LATENT * (len(trail) - 1)}"
    player.enter(Start(last, note, first.truth, trail[-1], kept=True), last, trail)


def walk_again(player: object, recorded: dict, done: int) -> None:
    """The recorded chunks after so many frames: what the model did once it does again."""
    session = player.session
    policy = session.policy
    at = 0
    for chunk in recorded["chunks"]:
        rows = slice(at, at + chunk["n"])
        at += chunk["n"]
        if at <= done:
            continue
        if chunk["n"] != session.frames_needed:
            session.options = replace(session.options, new=chunk["n"] // LATENT)
        session.policy = chunk["policy"]
        keyboard, mouse = (torch.tensor(recorded[key][rows]) for key in ("keyboard", "mouse"))
        session.step(keyboard, mouse)

    # and then as this player asked for
    session.policy = policy
    if not player.args.fake:
        session.options = replace(session.options, new=player.args.new)
