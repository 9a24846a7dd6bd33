"""Which requests can be told of: all that are under way, and so many of those that are not."""

from gralora_runtime.observation.timeline import Timeline
from gralora_runtime.observation.timelines import Timelines


def ids(kept: Timelines) -> list[str]:
    return [timeline.request_id for timeline in kept.recent()]


def test_a_crowd_that_is_under_way_pushes_nobody_out() -> None:
    kept = Timelines(2)
    for at in range(10):
        kept.keep(Timeline(request_id=f"r{at}"))
    kept.end("r3")
    assert len(ids(kept)) == 10
    assert kept.find("r3") is not None


def test_the_first_to_end_is_the_first_to_be_forgotten() -> None:
    kept = Timelines(2)
    for name in ("a", "b", "c", "d"):
        kept.keep(Timeline(request_id=name))
    for name in ("c", "a", "b", "nobody"):
        kept.end(name)
    assert ids(kept) == ["a", "b", "d"]
    assert kept.find("c") is None


def test_an_id_that_is_used_again_is_the_new_requests() -> None:
    kept = Timelines(2)
    kept.keep(Timeline(request_id="a", tenant="old"))
    kept.end("a")
    kept.keep(Timeline(request_id="a", tenant="new"))
    found = kept.find("a")
    assert found is not None
    assert found.tenant == "new"
    assert ids(kept) == ["a"]
