"""Cards that are lost, in error and back, while the watch runs over pynvml and a driver's library from a script."""

import logging

import pytest
import trio
from fakes.engine import until
from fakes.nvml import Machine as Nvml

from xim_agent.config.fields import Config
from xim_agent.hardware import watch
from xim_agent.hardware.cards import Cards
from xim_agent.hardware.machine import Machine
from xim_agent.hardware.watch import CardWatch, watch_for
from xim_agent.health import Health


@pytest.fixture
def health() -> Health:
    return Health(now=lambda: 0.0)


@pytest.fixture
def cards(nvml: Nvml) -> Cards:
    """The first and the second of three."""
    for _ in range(3):
        nvml.add()
    nvml.write()
    return Cards(frozenset({0, 1}))


@pytest.fixture
def watching(cards: Cards, health: Health) -> CardWatch:
    made = CardWatch(cards, health)
    made.note(cards.look(), 0.0)
    assert not made.in_trouble
    return made


def said(health: Health) -> dict[str, tuple[str, str]]:
    return {c.code: (c.text, health.hints[c.code]) for c in health.conditions()}


CARD_1 = "GPU 1 (NVIDIA A10, GPU-1111-aaaa, PCI 00000000:02:00.0)"


@pytest.mark.parametrize("broken", [{"error": 15}, {"memory_error": 15}])
def test_a_lost_card_is_named_and_its_return_is_seen(
    nvml: Nvml, cards: Cards, watching: CardWatch, health: Health, broken: dict[str, int]
) -> None:
    good = dict(nvml.gpus[1])
    nvml.gpus[1] |= broken
    nvml.write()
    for _ in range(3):
        watching.note(cards.look(), 1.0)
        text, cure = said(health)["gpu_lost"]
        assert text == f"{CARD_1} is lost: GPU is lost"
        assert "restart the machine" in cure
        assert watching.in_trouble
        assert nvml.sessions == 0, "a card cannot be reset while it is open here"
    nvml.gpus[1] = good
    nvml.write()
    watching.note(cards.look(), 2.0)
    assert (said(health), watching.in_trouble, nvml.sessions) == ({}, False, 1)
    cards.close()
    assert nvml.sessions == 0


def test_a_card_that_wants_a_reset_is_told_how(nvml: Nvml, cards: Cards, watching: CardWatch, health: Health) -> None:
    nvml.gpus[0]["error"] = 16
    nvml.write()
    watching.note(cards.look(), 1.0)
    assert "nvidia-smi --gpu-reset -i 00000000:01:00.0" in said(health)["gpu_lost"][1]


def test_the_drivers_own_advice(nvml: Nvml, cards: Cards, watching: CardWatch, health: Health) -> None:
    nvml.gpus[1]["recovery"] = 2
    nvml.write()
    watching.note(cards.look(), 1.0)
    assert said(health) == {"gpu_lost": (f"{CARD_1} cannot go on: its driver asks for recovery", "restart the machine")}
    nvml.gpus[1]["recovery"] = 0
    nvml.write()
    watching.note(cards.look(), 2.0)
    assert said(health) == {}
    cards.close()


def test_a_card_that_has_vanished_is_known_by_its_uuid(
    nvml: Nvml, cards: Cards, watching: CardWatch, health: Health
) -> None:
    first, *others = nvml.gpus
    nvml.gpus = [{**first, "error": 999}, *others]
    nvml.write()
    watching.note(cards.look(), 1.0)
    nvml.gpus = others  # their numbers are 0 and 1 now
    nvml.write()
    watching.note(cards.look(), 2.0)
    text = said(health)["gpu_lost"][0]
    assert text == "GPU 0 (NVIDIA A10, GPU-0000-aaaa, PCI 00000000:01:00.0) is gone from its driver"
    nvml.gpus = [first, *others]
    nvml.write()
    watching.note(cards.look(), 3.0)
    assert said(health) == {}
    cards.close()


def test_the_driver_is_unloaded(nvml: Nvml, cards: Cards, watching: CardWatch, health: Health) -> None:
    nvml.gpus[0]["error"] = 15
    nvml.write()
    watching.note(cards.look(), 1.0)
    nvml.driver["init"] = 9
    nvml.write()
    watching.note(cards.look(), 2.0)
    assert said(health)["gpu_lost"][0] == "the NVIDIA driver does not answer: Driver Not Loaded"
    assert watching.in_trouble


def test_another_agents_card_is_not_ours(nvml: Nvml, cards: Cards, watching: CardWatch, health: Health) -> None:
    nvml.gpus[2]["error"] = 15
    nvml.xids = [(2, 79)]
    nvml.write()
    watching.note(cards.look(), 1.0)
    assert (said(health), watching.in_trouble) == ({}, False)
    cards.close()


def test_an_xid_is_explained_and_forgotten_after_a_quiet_time(
    nvml: Nvml, cards: Cards, watching: CardWatch, health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.xids = [(1, 79), (1, 45)]
    nvml.write()
    with caplog.at_level(logging.INFO):
        watching.note(cards.look(), 10.0)
    text, cure = said(health)["gpu_error"]
    assert text == f"{CARD_1}: Xid 79, it has fallen off the bus"
    assert "seat and cable" in cure
    assert watching.in_trouble
    assert any(CARD_1 in record.getMessage() for record in caplog.records)
    watching.note(cards.look(), 10.0 + watch.QUIET_SECONDS - 1)
    assert watching.in_trouble
    nvml.xids.append((1, 79))
    nvml.write()
    watching.note(cards.look(), 39.0)
    watching.note(cards.look(), 39.0 + watch.QUIET_SECONDS - 1)
    assert watching.in_trouble, "it came again"
    watching.note(cards.look(), 39.0 + watch.QUIET_SECONDS)
    assert (said(health), watching.in_trouble) == ({}, False)
    cards.close()


def test_an_unknown_xid_says_where_to_look(nvml: Nvml, cards: Cards, watching: CardWatch, health: Health) -> None:
    nvml.xids = [(0, 998)]
    nvml.write()
    watching.note(cards.look(), 1.0)
    assert "Xid 998" in said(health)["gpu_error"][1]
    cards.close()


def test_harmless_xids_are_no_trouble(nvml: Nvml, cards: Cards, watching: CardWatch, health: Health) -> None:
    nvml.xids = [(0, 45), (0, 63), (1, 92)]
    nvml.write()
    watching.note(cards.look(), 1.0)
    assert (said(health), watching.in_trouble) == ({}, False)
    cards.close()


def test_a_card_without_events_is_watched_all_the_same(nvml: Nvml, cards: Cards, health: Health) -> None:
    nvml.gpus[0]["events"] = 3
    nvml.write()
    assert cards.look().lost == ()
    nvml.gpus[0]["error"] = 15
    nvml.write()
    assert "GPU 0" in cards.look().lost[0].what


async def test_the_service_sees_it_come_and_go(
    nvml: Nvml, cards: Cards, health: Health, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    changes: list[bool] = []
    made = CardWatch(cards, health)
    made.changed = lambda: changes.append(made.in_trouble)
    await nursery.start(made.run)
    await until(lambda: nvml.sessions == 1)
    nvml.gpus[1]["error"] = 15
    nvml.write()
    await until(lambda: made.in_trouble)
    assert CARD_1 in said(health)["gpu_lost"][0]
    nvml.gpus[1]["error"] = 0
    nvml.write()
    await until(lambda: not made.in_trouble)
    assert changes == [True, False]
    assert said(health) == {}


async def test_a_driver_that_hangs_is_trouble_until_it_answers(
    nvml: Nvml, cards: Cards, health: Health, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "HUNG_SECONDS", 0.2)
    nvml.hang = True
    nvml.write()
    made = CardWatch(cards, health)
    await nursery.start(made.run)
    await until(lambda: made.in_trouble)
    assert "has not answered" in said(health)["gpu_lost"][0]
    nvml.hang = False
    nvml.write()
    await until(lambda: not made.in_trouble)
    assert said(health) == {}


@pytest.mark.parametrize(
    ("settings", "watched"),
    [
        ({}, {0}),
        ({"tensor_parallel_size": 2}, {0, 1}),
        ({"tensor_parallel_size": 2, "cuda_visible_devices": "2,GPU-0000"}, {0, 2}),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, {0, 1, 2}),
    ],
)
async def test_the_cards_that_the_engine_uses_are_watched(
    nvml: Nvml, cards: Cards, health: Health, settings: dict[str, object], watched: set[int]
) -> None:
    made = watch_for(await Machine.find(Config(**settings), {}), health)  # type: ignore[arg-type]
    assert made.watched == watched


async def test_on_a_cpu_machine_the_service_ends(nvml: Nvml, health: Health) -> None:
    made = watch_for(await Machine.find(Config(), {}), health)
    await made.run()
    assert (made.watched, made.in_trouble, said(health)) == (frozenset(), False, {})
