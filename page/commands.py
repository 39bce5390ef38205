"""What the page can ask for: one function for every command, and what a POST means.

A request is heard by a thread of the server, which only touches the controls, or queues a command.
The player obeys between two chunks. What a client sends is data: never a path, never code.
"""

import base64
import math
import queue
import secrets
from collections.abc import Callable

from page import opening
from page.controls import KEYS
from page.start import open_start
from page.wayback import BUSY

MOST_KEYS = 16  # of one input that are looked at
FARTHEST = 4e3  # pixels that a mouse moves between two posts
PLAN = 64  # slots at most
PROMPT = 1000  # letters at most


def swapped(value: str, one: str, other: str) -> str:
    return other if value == one else one


def pause(player: object, body: dict) -> None:
    player.set["paused"] = not player.set["paused"]
    player.controls.forget()


def hidden(player: object, body: dict) -> None:
    """Is the tab of whoever plays out of sight? Then the world waits, as it does without a viewer."""
    player.hidden = body.get("on") is True
    player.controls.forget()


def step(player: object, body: dict) -> None:
    """One chunk, though paused; in turns it is the plan that asks for one."""
    if player.tempo() == "turn" and not player.script:
        raise ValueError("you play in turns: write a plan and press Enter")
    player.once = player.set["paused"]


def undo(player: object, body: dict) -> None:
    if player.game.phase in BUSY:
        raise ValueError("what was walked in the game counts")
    player.undo()


def memory(player: object, body: dict) -> None:
    """Off and on: what a world is without its memory."""
    if player.game.phase in BUSY:
        raise ValueError("the game walks without memory by itself, at the end")
    chosen = player.args.memory  # --memory
    wanted = "camera" if chosen == "none" else chosen
    player.session.policy = swapped(player.session.policy, wanted, "none")


def view(player: object, body: dict) -> None:
    """The model, or the true renderer where the world is known."""
    if player.begun.truth:
        player.set["view"] = swapped(player.set["view"], "model", "truth")


def pace(player: object, body: dict) -> None:
    player.set["pace"] = swapped(player.tempo(), "live", "turn")
    player.plan = None
    player.controls.forget()


def run(player: object, body: dict) -> None:
    """A plan for the next chunk: the keys of every latent."""
    chords = ["+".join(sorted(set(slot) & set(KEYS))) or "_" for slot in body["plan"][:PLAN]]
    player.plan = chords or None


def record(player: object, body: dict) -> None:
    """Off; and on again, with the last minute."""
    if player.recording:
        player.save()
    else:
        player.record()


def prompt(player: object, body: dict) -> None:
    player.prompt = str(body["text"])[:PROMPT]
    player.screen.note(info="The new prompt is used from the next start on (R).")


def restart(player: object, body: dict) -> None:
    player.reset(player.begun)


def seed(player: object, body: dict) -> None:
    """The same start, other noise."""
    player.seed = secrets.randbelow(1 << 31)
    player.reset(player.begun)


def image(player: object, body: dict) -> None:
    """A picture that was dropped on the page, or one of the gallery."""
    picture = base64.b64decode(body["data"], validate=True)
    start = open_start(picture, player.size, "the new picture", player.args.view)
    player.reset(opening.numbered(start, picture, player.gallery))


def walk(player: object, body: dict) -> None:
    """The walk of a link; one that cannot be read is ignored, and the page says why."""
    try:
        opening.walk_link(player, str(body["link"]))
    except ValueError as error:
        player.screen.note(info=f"The walk in this link is ignored: {error}.")


def share(player: object, body: dict) -> None:
    """The way so far as a link."""
    player.screen.note(link=opening.link_of(player))


def game(player: object, body: dict) -> None:
    """Find the way back: begin, be led home, stop."""
    if body["do"] == "begin":
        player.game.begin(player)
    elif body["do"] == "home":
        player.game.lead_home(player)
    else:
        player.game.stop(player)


COMMANDS: dict[str, Callable] = {
    "pause": pause,
    "hidden": hidden,
    "step": step,
    "undo": undo,
    "restart": restart,
    "seed": seed,
    "memory": memory,
    "view": view,
    "record": record,
    "pace": pace,
    "run": run,
    "image": image,
    "prompt": prompt,
    "walk": walk,
    "share": share,
    "game": game,
}


def obey(player: object, body: dict) -> None:
    """One command, between two chunks; a mistake in it is told on the page."""
    name = body["cmd"]
    try:
        COMMANDS[name](player, body)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        player.screen.note(info=f"{name}: {error}")
    player.say_facts()


def heard(player: object, route: str, body: dict) -> tuple[int, str]:
    """The status and the error that answer a POST."""
    if route == "/input":
        return heard_input(player, body)
    name = body.get("cmd")
    if not isinstance(name, str) or name not in COMMANDS:
        return 400, f"unknown command; use one of {tuple(COMMANDS)}"
    if not player.screen.plays(body.get("id")):
        return 403, "another tab plays, this one watches"
    try:
        player.commands.put_nowait(body)
    except queue.Full:
        return 429, "too many commands at once"
    return 200, ""


def heard_input(player: object, body: dict) -> tuple[int, str]:
    """Keys held now, pixels since the last post, the newest frame that was drawn."""
    viewer = body.get("id")
    dx, dy, shown = (float(body.get(name) or 0) for name in ("dx", "dy", "shown"))
    if not all(map(math.isfinite, (dx, dy, shown))):
        return 400, "dx, dy and shown must be finite numbers"
    player.screen.ack(viewer, shown)
    if player.screen.plays(viewer):
        held = body.get("keys", [])
        if not isinstance(held, list):
            return 400, "keys must be a list"
        keys = [key for key in held[:MOST_KEYS] if key in KEYS]
        turns = (max(-FARTHEST, min(FARTHEST, pixels)) for pixels in (dx, dy))
        player.controls.post(keys, *turns)
    return 204, ""
