"""web/page.js in node: a page that draws nothing, a clock that is turned by hand, and a world that answers
when it is told to."""

import pytest
from test_web import javascript, needs_node

PAGE = """
    // whatever the page asks its document for is there, and does nothing
    const nothing = () => {
      const known = {};
      return new Proxy(() => nothing(), {
        get: (_, name) => {
          if (name === Symbol.iterator) return [][Symbol.iterator].bind([]);
          if (name === Symbol.toPrimitive) return () => "";
          if (name === "then") return undefined;
          return (known[name] ??= nothing());
        },
        set: (_, name, value) => [(known[name] = value)],
      });
    };
    const elements = {};
    const clicks = {};
    const element = (id) => {
      if (elements[id]) return elements[id];
      const made = (elements[id] = nothing());
      made.addEventListener = (name, heard) => (clicks[id] = heard);
      return made;
    };
    const document = nothing();
    document.getElementById = element;
    document.querySelectorAll = () => [];

    // a clock, one waiting picture, and questions that are answered by hand
    let clock = 0;
    let tick = null;
    const asked = [];
    const later = setTimeout;
    const given_globals = {
      document,
      window: globalThis,
      navigator: {},
      location: { hash: "", search: "" },
      performance: { now: () => clock },
      requestAnimationFrame: (next) => (tick = next),
      setTimeout: (f, ms) => later(f, ms).unref(),
      addEventListener: () => {},
      matchMedia: () => ({ matches: false }),
      getComputedStyle: () => ({ getPropertyValue: () => "" }),
      devicePixelRatio: 1,
      ImageData: class {
        constructor(data, width, height) { Object.assign(this, { data, width, height }); }
      },
      Worker: class {
        postMessage(message) { asked.push({ ...message, worker: this }); }
      },
    };
    for (const [name, value] of Object.entries(given_globals)) {
      Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
    }

    const soon = () => new Promise((resolve) => later(resolve, 10));
    const question = async (name) => {
      while (!asked.some((one) => one.name === name)) await soon();
      return asked.splice(asked.findIndex((one) => one.name === name), 1)[0];
    };
    const settle = async (name, answer, error) => {
      const { id, worker, question: told } = await question(name);
      const data = { id, error, answer: answer?.(told) };
      worker.onmessage({ data });
      await soon();
    };
    const chunk = (first, n) => ({
      frames: new Uint8ClampedArray(4 * n),
      poses: Array(n).fill([0, 0, 0, 0, 0]),
      chords: Array(n).fill("_"),
      memory: [],
      first,
    });
    const facts = { frame: [1, 1], lengths: [2, 5, 10], memory: true, starts: ["one"] };
    const pass = (ms) => {
      clock += ms;
      const now = tick;
      tick = null;
      now?.();
    };

    await import("./page.js");
    await settle("open", () => ({ facts, backend: "wasm" }));
    await settle("reset", () => chunk(0, 1));
    pass(1);
    await settle("step", ({ chords }) => chunk(1, chords.length));
    pass(100);
"""


@needs_node
def test_a_new_walk_begins_while_frames_of_the_old_one_wait() -> None:
    got = javascript(
        PAGE
        + """
        const shown = page.state.frames;
        page.begin({ seed: 7 });
        const left = page.screen.waiting.length;
        try { pass(500); } catch (error) { return { error: String(error) }; }
        await settle("reset", () => chunk(0, 1));
        pass(1);
        return { shown, left, now: page.state.frames, poses: page.state.path.length, alive: !!tick };
        """
    )
    assert got.pop("shown") > 0
    assert got == {"left": 0, "now": 0, "poses": 1, "alive": True}


@needs_node
def test_a_frame_that_cannot_be_drawn_is_not_the_last() -> None:
    program = """
        page.screen.onFrame = () => { throw new Error("no"); };
        try { pass(100); } catch { return !!tick; }
    """
    assert javascript(PAGE + program)


REPLAY = """
    const { game } = page;
    game.best = { index: 8, pixels: { data: [0] } };
    game.first = { pixels: { data: [0] }, pose: [0, 0, 0, 0, 0] };
    page.state.fresh = 2;
    game.arrive();
"""


@needs_node
def test_a_replay_cannot_be_paused() -> None:
    got = javascript(
        PAGE
        + REPLAY
        + """
        const paused = ["Space", "KeyM", "KeyP"].map((code) => {
          page.controls.onCommand(code, { preventDefault() {} });
          return page.state.paused;
        });

        // stopping it is a new walk: the model's thread no longer stands where the player stood
        const { world } = page.state;
        clicks["game-stop"]({});
        return { paused, phase: game.phase, restarted: page.state.world > world };
        """
    )
    assert got == {"paused": [True] * 3, "phase": "off", "restarted": True}


@needs_node
@pytest.mark.parametrize(
    "doing",
    [
        'page.controls.onCommand("KeyR", { preventDefault() {} });',
        'clicks["game-start"]({});',
        REPLAY,
    ],
)
def test_a_world_that_stops_is_said_whoever_asked(doing: str) -> None:
    program = """
        await settle("reset", null, "The world stopped: no room");
        return elements.banner.textContent;
    """
    assert javascript(PAGE + doing + program) == "The world stopped: no room"


@needs_node
def test_a_walk_goes_on_after_a_step_that_failed() -> None:
    program = """
        await settle("step", null, "The world stopped: no room");
        page.controls.onCommand("KeyC", { preventDefault() {} });
        await soon();
        const stays = elements.banner.textContent;
        page.controls.onCommand("KeyR", { preventDefault() {} });
        await settle("reset", () => chunk(0, 1));
        pass(1);
        pass(100);
        await settle("step", ({ chords }) => chunk(1, chords.length));
        pass(100);
        return [stays, elements.banner.textContent, elements.banner.className, page.state.frames > 0];
    """
    stays, banner, kind, goes_on = javascript(PAGE + "pass(5000);" + program)
    assert stays == "The world stopped: no room"
    assert (banner, kind, goes_on) == ("", "", True)


@needs_node
def test_what_was_tapped_in_a_pause_asks_for_nothing() -> None:
    program = """
        const { controls, state } = page;
        const press = (code) => controls.onCommand(code, { preventDefault() {} });
        press("KeyP");
        controls.set("keyboard", ["w"]);
        controls.set("keyboard", []);
        controls.drag = [90, 0];
        press("KeyP");
        return [controls.decide(8), controls.pressed.size];
    """
    assert javascript(PAGE + program) == [["_"] * 8, 0]


@needs_node
def test_only_what_went_down_is_a_tap() -> None:
    program = """
        Object.defineProperty(globalThis, "navigator", { value: {}, configurable: true });
        const { Controls } = await import("./controls.js");
        const controls = new Controls();
        controls.set("keyboard", ["w"]);
        const held = controls.decide(4);
        controls.set("keyboard", ["w", "a"]);
        controls.set("keyboard", []);
        return [held, controls.decide(8)];
    """
    held, after = javascript(program)
    assert held == ["w"] * 4
    assert after == ["a"] * 4 + ["_"] * 4


@needs_node
def test_who_stops_the_game_is_led_home_no_further() -> None:
    program = """
        page.state.script = Array(100).fill("s");
        page.state.homeward = true;
        page.game.phase = "home";
        clicks["game-stop"]({});
        return [page.state.script.length, page.state.homeward, page.game.phase];
    """
    assert javascript(PAGE + program) == [0, False, "off"]


@needs_node
def test_after_a_step_that_failed_going_on_is_a_new_walk() -> None:
    program = """
        pass(5000);
        await settle("step", null, "The world stopped: no room");
        const { world, paused } = page.state;
        page.controls.onCommand("KeyP", { preventDefault() {} });
        await settle("reset", () => chunk(0, 1));
        return [paused, page.state.world > world, elements.banner.className];
    """
    assert javascript(PAGE + program) == [True, True, ""]


@needs_node
def test_a_first_walk_that_does_not_begin_is_not_the_last() -> None:
    before, loading, _ = PAGE.partition('await import("./page.js");')
    program = """
        await settle("open", () => ({ facts, backend: "wasm" }));
        await settle("reset", null, "The world stopped: no picture");
        page.controls.onCommand("KeyR", { preventDefault() {} });
        await settle("reset", () => chunk(0, 1));
        pass(1);
        const { question: told } = await question("step");
        return told.chords.length;
    """
    assert javascript(before + loading + program) > 0


@needs_node
def test_frames_that_were_never_painted_do_not_count_as_shown() -> None:
    program = """
        page.screen.drawn = [];
        page.screen.put(chunk(100, 40), 10);
        for (let k = 0; k < 4; k++) pass(100);
        return page.screen.drawn.length;
    """
    assert javascript(PAGE + program) <= 4


@needs_node
def test_a_chunk_that_arrives_in_a_pause_is_late_once() -> None:
    program = """
        pass(60000);
        page.controls.onCommand("KeyP", { preventDefault() {} });
        pass(8000);
        page.screen.put(chunk(100, 4), 10);
        pass(2000);
        page.controls.onCommand("KeyP", { preventDefault() {} });
        return page.screen.left();
    """
    assert javascript(PAGE + program) == 40


@needs_node
def test_a_model_without_memory_gets_none_in_the_game() -> None:
    program = """
        page.state.facts.memory = false;
        clicks["game-start"]({});
        await settle("reset", () => chunk(0, 1));
        return page.state.remember;
    """
    assert javascript(PAGE + program) is False
