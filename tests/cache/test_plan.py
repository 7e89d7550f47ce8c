from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xim_agent.cache.inventory import BLOCK, Evict, Inventory, Model, Partial, allocated
from xim_agent.cache.plan import GIB, CacheRefused, Case, Drain, Expand, Fetch, Holds, Limits, Need, Plan, plan, trim

MB = 1_000_000
NOW = 1e9
ROOMY = 1000 * GIB


def limits(bound: int, free: int = ROOMY) -> Limits:
    """A bound of which `bound` bytes are usable beside the reserve for compile caches."""
    whole = -(-bound * 10 // 9)
    return Limits(whole, free, ROOMY, NOW, "1.0")


def model(name: str, *, chunks: int = 0, ready: int = 0, used: float = 0.0, pieces: int = 4) -> dict[str, Any]:
    """`chunks`, `ready` in bytes."""
    blobs = {f"{name}{i}": chunks // pieces for i in range(pieces)} if chunks else {}
    return {"blobs": blobs, "model": Model(name, used, frozenset(blobs), bool(chunks), ready)}


def inventory(*models: dict[str, Any], **more: Any) -> Inventory:
    return Inventory(
        models={m["model"].manifest: m["model"] for m in models},
        blobs={b: n for m in models for b, n in m["blobs"].items()},
        **more,
    )


def need(name: str = "new", chunks: int = 40 * MB, files: int = 60 * MB, pieces: int = 4, workers: int = 1) -> Need:
    return Need(name, {f"{name}{i}": chunks // pieces for i in range(pieces)}, files, workers=workers)


def shape(p: Plan) -> list[Any]:
    return [(s.what, s.key) if isinstance(s, Evict) else s for s in p.steps]


OLD = model("old", chunks=40 * MB, ready=60 * MB, used=NOW)
SERVING = Holds(in_use=frozenset({"old"}))


def test_an_empty_cache_takes_chunks_and_files() -> None:
    p = plan(Inventory(), need(), limits(100 * MB), Holds())
    assert (p.case, shape(p)) == (Case.SERVE, [Expand(keep=True)])


def test_chunks_are_streamed_through_where_both_do_not_fit() -> None:
    p = plan(Inventory(), need(), limits(99 * MB), Holds())
    assert (p.case, shape(p)) == (Case.SERVE, [Expand(keep=False)])


def test_stored_chunks_are_eaten_where_both_do_not_fit() -> None:
    p = plan(inventory(model("new", chunks=40 * MB)), need(), limits(80 * MB), Holds())
    assert shape(p) == [Expand(keep=False)]


def test_refused_with_the_sums_where_the_model_alone_does_not_fit() -> None:
    with pytest.raises(CacheRefused) as e:
        plan(inventory(OLD), need(), limits(59 * MB), SERVING)
    assert (e.value.needed, e.value.bound, e.value.free, e.value.reserve) == (
        60 * MB,
        limits(59 * MB).bound,
        ROOMY,
        ROOMY // 50,
    )
    assert "needed 0.06 GB, cache bound 0.07 GB" in e.value.message
    assert "XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB" in e.value.hint


def test_the_reserve_is_1_gib_and_of_large_disks_2_percent() -> None:
    assert [Limits(1, 1, size).reserve for size in (0, 50 * GIB, 100 * GIB, 1000 * GIB)] == [
        GIB,
        GIB,
        2 * GIB,
        20 * GIB,
    ]


def test_refused_where_the_disk_is_too_full() -> None:
    free = ROOMY // 50 + 50 * MB
    with pytest.raises(CacheRefused) as e:
        plan(Inventory(), need(), limits(1000 * MB, free), Holds())
    assert "free space" in e.value.hint
    assert plan(Inventory(), need(), limits(1000 * MB, free + 10 * MB), Holds()).steps == (Expand(keep=False),)


def test_what_eviction_gives_back_counts_as_free_disk() -> None:
    free = ROOMY // 50
    p = plan(inventory(model("a", ready=60 * MB)), need(), limits(1000 * MB, free), Holds())
    assert shape(p) == [("ready", "a"), Expand(keep=False)]


def test_the_order_of_eviction() -> None:
    everything = inventory(
        OLD,
        model("a", chunks=8 * MB, ready=8 * MB, used=2.0),
        model("b", chunks=8 * MB, ready=8 * MB, used=1.0),
        model("c", ready=8 * MB, used=0.0),
        quarantine=8 * MB,
        partials={"stale": Partial(8 * MB, NOW - 90_000), "fresh": Partial(8 * MB, NOW - 10)},
        compile={"0.9": 8 * MB, "1.0": 0},
    )
    everything = replace(everything, blobs={**everything.blobs, "orphan": 8 * MB})
    order = [
        ("quarantine", ""),
        ("orphans", ""),
        ("partial", "stale"),
        ("compile", "0.9"),
        ("ready", "b"),
        ("ready", "a"),
        ("ready", "c"),
        ("chunks", "old"),
        ("chunks", "b"),
        ("chunks", "a"),
        ("partial", "fresh"),
    ]
    for count in range(len(order) + 1):
        gone = 8 * count + (32 if count >= order.index(("chunks", "old")) + 1 else 0)
        usable = everything.total - gone * MB + 60 * MB
        p = plan(everything, need(chunks=4000 * MB), limits(usable), SERVING)
        assert shape(p) == [*order[:count], Expand(keep=False)], count


def test_pinned_models_stay() -> None:
    a = inventory(model("a", chunks=40 * MB, ready=60 * MB))
    with pytest.raises(CacheRefused):
        plan(a, need(), limits(159 * MB), Holds(pinned=frozenset({"a"})))
    assert shape(plan(a, need(), limits(160 * MB), Holds(pinned=frozenset({"a"})))) == [Expand(keep=False)]


def test_a_blob_goes_only_with_its_last_manifest() -> None:
    a, b = model("a", chunks=40 * MB, used=1.0), model("b", chunks=40 * MB, used=2.0)
    b["model"] = replace(b["model"], chunks=b["model"].chunks | {"a0"})
    p = plan(inventory(a, b), need(), limits(119 * MB + 1), Holds())
    first, second = (s for s in p.steps if isinstance(s, Evict))
    assert (first.key, first.blobs) == ("a", frozenset({"a1", "a2", "a3"}))
    assert (second.key, second.blobs) == ("b", frozenset({"b0", "b1", "b2", "b3", "a0"}))


def test_a_blob_that_the_operation_needs_stays() -> None:
    a = model("a", chunks=40 * MB)
    wanted = replace(need(), chunks={"a0": 10 * MB, "new1": 30 * MB})
    p = plan(inventory(a), wanted, limits(100 * MB), Holds())
    assert [s.blobs for s in p.steps if isinstance(s, Evict)] == [frozenset({"a1", "a2", "a3"})]


def test_a_chunk_whose_manifest_was_lost_stays_where_the_operation_needs_it() -> None:
    a = Inventory(blobs={"new0": 10 * MB, "lost": 10 * MB})
    p = plan(a, need(), limits(105 * MB), Holds())
    assert [s.blobs for s in p.steps if isinstance(s, Evict)] == [frozenset({"lost"})]
    assert p.steps[-1] == Expand(keep=True)


def test_case_1_chunks_while_serving_then_drain_and_expand() -> None:
    p = plan(inventory(OLD), need(), limits(110 * MB), SERVING)
    assert p.case is Case.CHUNKS_FIRST
    assert shape(p) == [("chunks", "old"), Fetch(), Drain(), ("ready", "old"), Expand(keep=True)]
    assert p.outage == 60 * MB


def test_case_1_eats_the_chunks_where_files_and_chunks_do_not_fit() -> None:
    p = plan(inventory(OLD), need(chunks=20 * MB, files=70 * MB), limits(80 * MB), SERVING)
    assert shape(p) == [("chunks", "old"), Fetch(), Drain(), ("ready", "old"), Expand(keep=False)]


def test_case_2_drain_first() -> None:
    p = plan(inventory(OLD), need(), limits(90 * MB), SERVING)
    assert p.case is Case.DRAIN_FIRST
    assert shape(p) == [Drain(), ("ready", "old"), ("chunks", "old"), Expand(keep=False)]
    assert p.outage == 100 * MB


def test_serving_goes_on_where_streaming_through_is_enough() -> None:
    p = plan(inventory(OLD), need(), limits(120 * MB), SERVING)
    assert (p.case, shape(p)) == (Case.SERVE, [("chunks", "old"), Expand(keep=False)])
    assert p.outage == 0


def test_what_a_partial_holds_is_not_counted_twice() -> None:
    a = inventory(partials={"new": Partial(30 * MB, NOW)})
    done = replace(need(), done=frozenset({"new0", "new1"}))
    assert plan(a, done, limits(80 * MB), Holds()).steps == (Expand(keep=True),)
    assert plan(a, done, limits(79 * MB), Holds()).steps == (Expand(keep=False),)


def test_a_ready_model_needs_nothing_but_the_bound() -> None:
    a = inventory(model("new", ready=60 * MB), model("a", chunks=40 * MB))
    p = plan(a, replace(need(), files=0), Limits(100 * MB, 0, ROOMY), Holds())
    assert (p.case, p.steps) == (Case.READY, ())
    p = plan(a, replace(need(), files=0), Limits(99 * MB, 0, ROOMY), Holds())
    assert shape(p) == [("chunks", "a")]
    with pytest.raises(CacheRefused):
        plan(a, replace(need(), files=0), Limits(59 * MB, 0, ROOMY), Holds())


def test_the_reserve_for_compile_caches_shrinks_as_they_grow() -> None:
    bound = 200 * GIB
    wanted = need(files=197 * GIB, chunks=300 * GIB)
    assert plan(Inventory(), wanted, limits(0).__class__(bound, ROOMY, ROOMY, NOW, "1.0"), Holds())
    with pytest.raises(CacheRefused):
        plan(Inventory(), replace(wanted, files=198 * GIB + 1), Limits(bound, ROOMY, ROOMY, NOW, "1.0"), Holds())
    compiled = inventory(compile={"1.0": GIB})
    assert plan(compiled, replace(wanted, files=198 * GIB), Limits(bound, ROOMY, ROOMY, NOW, "1.0"), Holds())


def test_the_own_chunks_of_a_ready_model_are_a_second_copy() -> None:
    """Where the bound was lowered they go after what others have ready, before the chunks of others."""
    own, other = model("new", chunks=40 * MB, ready=60 * MB), model("a", chunks=10 * MB, ready=5 * MB, used=9.0)
    wanted = replace(need(), files=0)
    found = {
        gone: shape(plan(inventory(own, other), wanted, Limits((115 - gone) * MB, 0, ROOMY), Holds()))
        for gone in (0, 5, 45, 55)
    }
    assert found[0] == []
    assert found[5] == [("ready", "a")]
    assert found[45] == [("ready", "a"), ("chunks", "new")]
    assert found[55] == [("ready", "a"), ("chunks", "new"), ("chunks", "a")]


def test_a_chunk_that_is_cut_short_is_needed_again() -> None:
    cut = model("new", chunks=40 * MB)
    short = replace(inventory(cut), blobs={**cut["blobs"], "new0": 0})
    assert plan(short, need(), limits(100 * MB), Holds()).steps == (Expand(keep=True),)
    assert plan(short, need(), limits(95 * MB), Holds()).steps == (Expand(keep=False),)


def test_what_grows_beside_the_model_is_planned_too() -> None:
    beside = replace(need(), beside=MB)
    assert plan(Inventory(), beside, limits(101 * MB), Holds()).steps == (Expand(keep=True),)
    assert plan(Inventory(), beside, limits(100 * MB), Holds()).steps == (Expand(keep=False),)
    with pytest.raises(CacheRefused):
        plan(Inventory(), beside, limits(60 * MB), Holds())


def test_trimming_takes_the_wanted_model_last_and_nothing_held() -> None:
    world = inventory(
        model("used", chunks=8 * MB, ready=8 * MB),
        model("want", chunks=8 * MB, ready=8 * MB, used=1.0),
        model("kept", chunks=8 * MB, ready=8 * MB, used=2.0),
        model("a", chunks=8 * MB, ready=8 * MB, used=3.0),
        quarantine=8 * MB,
        compile={"0.9": 8 * MB, "1.0": 8 * MB},
    )
    holds = Holds(in_use=frozenset({"used"}), pinned=frozenset({"kept"}))
    steps = trim(world, "want", limits(0), holds)
    order = ["", "0.9", "a", "used", "a", "want", "want"]
    assert [(s.key, s.what) for s in steps] == list(
        zip(order, ["quarantine", "compile", "ready", "chunks", "chunks", "ready", "chunks"], strict=True)
    )
    assert trim(world, "want", replace(limits(0), bound=world.total), holds) == ()


# -- never above the bound, whatever is there and whatever is wanted ----------------------------------------------

SIZES = st.integers(1, 40).map(lambda n: n * 1000)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Inventory, Need, Limits, Holds, dict[str, list[tuple[int, int]]]]:
    """The last part: for each blob of the wanted model the (stored, plain) sizes of its places in one file."""
    names = draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4))
    pool = {f"x{i}": allocated(draw(SIZES)) for i in range(8)}
    models, blobs = {}, {}
    for name in names:
        chunks = frozenset(draw(st.sets(st.sampled_from(sorted(pool)), max_size=4)))
        blobs |= {b: pool[b] for b in chunks}
        ready = draw(st.one_of(st.just(0), SIZES.map(allocated)))
        models[name] = Model(name, draw(st.floats(0, 10)), chunks, draw(st.booleans()), ready)
    target = draw(st.sampled_from("abcdn"))
    places: dict[str, list[tuple[int, int]]] = {}
    if target in models:
        models[target] = replace(models[target], ready=0)
        wanted = set(models[target].chunks)
    else:
        wanted = set()
    wanted |= draw(st.sets(st.sampled_from(sorted(pool)), min_size=1, max_size=5))
    for blob in sorted(wanted):
        stored = pool[blob] - BLOCK
        places[blob] = [(stored, stored + draw(st.integers(0, 30_000))) for _ in range(draw(st.integers(1, 2)))]
    if target in models:
        models[target] = replace(models[target], chunks=frozenset(b for b in wanted if b in blobs))
    elif wanted & blobs.keys():
        models[target] = Model(target, 0.0, frozenset(wanted & blobs.keys()))
    files = sum(allocated(plain) for where in places.values() for _, plain in where)
    in_use = frozenset(draw(st.sets(st.sampled_from([n for n in models if models[n].ready] or ["z"]), max_size=1)))
    pinned = frozenset(draw(st.sets(st.sampled_from("abcd"), max_size=2))) - in_use
    here = Inventory(
        models=models,
        blobs=blobs | draw(st.dictionaries(st.just("orphan"), SIZES)),
        partials=draw(st.dictionaries(st.sampled_from("pq"), st.builds(Partial, SIZES, st.floats(0, NOW)))),
        compile=draw(st.dictionaries(st.sampled_from(["1", "2"]), SIZES)),
        quarantine=draw(st.integers(0, 50_000)),
        other=draw(st.integers(0, 20_000)),
    )
    bound = draw(st.integers(1, 600)) * 1000
    free = GIB + draw(st.integers(-50, 400)) * 1000
    wish = Need(target, {b: pool[b] for b in wanted}, files, workers=draw(st.integers(1, 3)))
    return here, wish, Limits(bound, free, GIB, NOW, "1"), Holds(in_use, pinned), places


class Disk:
    """Carries out a plan in the least favourable order, and looks after every single write."""

    def __init__(self, world: tuple[Inventory, Need, Limits, Holds, dict[str, list[tuple[int, int]]]]) -> None:
        here, self.need, self.limits, self.holds, self.places = world
        self.ready = {m.manifest: m.ready for m in here.models.values() if m.ready}
        self.keeps = {m.manifest: set(m.chunks) for m in here.models.values()}
        self.blobs = dict(here.blobs)
        self.partials = {k: p.bytes for k, p in here.partials.items()}
        self.compile = dict(here.compile)
        self.quarantine, self.other, self.written = here.quarantine, here.other, 0
        self.start = here.total
        self.drained = False

    @property
    def total(self) -> int:
        parts = (self.ready, self.blobs, self.partials, self.compile)
        return sum(sum(p.values()) for p in parts) + self.quarantine + self.other + self.written

    def look(self) -> None:
        assert self.total <= self.limits.bound
        assert self.limits.disk_free + self.start - self.total >= self.limits.reserve

    def run(self, steps: tuple[Any, ...]) -> None:
        for step in steps:
            if isinstance(step, Evict):
                self.evict(step)
            elif isinstance(step, Drain):
                self.drained = True
            elif isinstance(step, Fetch):
                for blob in self.need.chunks:
                    self.store(blob)
            else:
                self.expand(step.keep)
                self.look()

    def store(self, blob: str) -> None:
        if blob not in self.blobs:
            self.blobs[blob] = self.need.chunks[blob]
            self.look()
        self.keeps.setdefault(self.need.manifest, set()).add(blob)

    def expand(self, keep: bool) -> None:
        others = {b for m, chunks in self.keeps.items() if m != self.need.manifest for b in chunks}
        eaten = set() if keep else (self.keeps.get(self.need.manifest, set()) & self.blobs.keys()) - others
        order = sorted(self.places, key=lambda b: b not in self.blobs)
        waiting: list[str] = []
        for blob in order:
            if keep:
                self.store(blob)
            self.written += sum(allocated(plain) for _, plain in self.places[blob])
            self.look()
            if blob in eaten:
                waiting.append(blob)
            if len(waiting) == self.need.workers:
                del self.blobs[waiting.pop()]

    def evict(self, step: Evict) -> None:
        before = self.total
        assert step.key not in self.holds.pinned
        assert step.key != self.need.manifest
        if step.what == "ready":
            assert self.drained or step.key not in self.holds.in_use
            del self.ready[step.key]
        elif step.what == "chunks":
            self.keeps[step.key] = set()
        elif step.what == "partial":
            del self.partials[step.key]
        elif step.what == "compile":
            assert step.key != self.limits.vllm
            del self.compile[step.key]
        elif step.what == "quarantine":
            self.quarantine = 0
        for blob in step.blobs:
            assert blob not in self.need.chunks
            del self.blobs[blob]
        assert before - self.total == step.bytes > 0


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_the_bound_is_never_exceeded_and_nothing_held_is_evicted(world: Any) -> None:
    here, wish, bounds, holds, _ = world
    try:
        p = plan(here, wish, bounds, holds)
    except CacheRefused:
        return
    Disk(world).run(p.steps)


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_a_refusal_means_that_it_does_not_fit(world: Any) -> None:
    """With nothing else in the cache, nothing pinned and no model in use, files and reserves are all that counts."""
    here, wish, bounds, _, _ = world
    assume(wish.manifest not in here.models)
    alone = Inventory(other=here.other)
    fits = wish.files <= min(bounds.bound - here.other - bounds.compile_reserve, bounds.disk_free - bounds.reserve)
    try:
        plan(alone, wish, bounds, Holds())
    except CacheRefused:
        assert not fits
    else:
        assert fits
