"""The serving benchmark and the soak test, piece by piece and tiny: requests, peers, tables, verdicts."""

import asyncio
import base64
import functools
import io
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks.serve_peers import (
    GENERATIONS_ROUTE,
    MOST_PICTURES,
    Grouped,
    OneByOne,
    Order,
    Wanted,
    group_equal,
    make_app,
    served_peers,
)
from benchmarks.serve_requests import (
    PRESET_GUIDANCE,
    PRESET_STEPS,
    ask_all,
    largest_difference,
    plan_requests,
    rows_of,
    slope_per_1000,
)
from benchmarks.serve_tables import MemoryCourse, Results, Saturation, judge, show
from benchmarks.soak_checks import Kill, Log, Sample, Swap, follow_times, growth_mib, sort_errors
from benchmarks.soak_checks import judge as judge_soak
from benchmarks.soak_traffic import FORMS, Attempt, Kind, Story, read_error, send_traffic
from cluster.placement import PlacementSection, ServeSection
from cluster.session import local_session
from components.load_plan import Arrival
from components.models import load_parts
from components.provenance import encode
from components.sampler import draw
from components.signing_key import Signer, open_signer, read_public_keys
from tests.endpoint import endpoint
from tests.servers import running, wait_for

ROOT = Path(__file__).parents[2]
FULL = {"clear": "503 replica_gone", "unclear": "ReadError", "final": "400 invalid_value", "drawn": "", "left": ""}


def tiny(**changed: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "size": "16x16", "steps": 2, "guidance_scale": 3.0, "n": 1, "seed": 4, **changed}


# Requests


def test_plan_is_drawn_from_its_seed_alone_and_holds_what_was_asked_for() -> None:
    plan = plan_requests(300, 2.0, seed=1)
    assert plan == plan_requests(300, 2.0, seed=1) != plan_requests(300, 2.0, seed=2)
    assert len(plan) == 300 and all(one.due_s < other.due_s for one, other in itertools.pairwise(plan))
    assert plan[-1].due_s == pytest.approx(150, rel=0.25), "two a second"
    assert {arrival.body["steps"] for arrival in plan} <= set(range(8, 41))
    assert {arrival.body["guidance_scale"] for arrival in plan} == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}
    assert 0 < sum(arrival.body["n"] == 4 for arrival in plan) < 60
    assert plan_requests(40, 2.0, seed=1) == plan[:40], "a longer plan begins as the shorter one"


def test_presets_are_few_and_differ_in_nothing_else() -> None:
    drawn, presets = plan_requests(50, 2.0, seed=3), plan_requests(50, 2.0, seed=3, presets=True)
    assert {arrival.body["steps"] for arrival in presets} <= set(PRESET_STEPS)
    assert {arrival.body["guidance_scale"] for arrival in presets} <= set(PRESET_GUIDANCE)
    for one, other in zip(drawn, presets, strict=True):
        same = {"steps": 0, "guidance_scale": 0}
        assert one.due_s == other.due_s and {**one.body, **same} == {**other.body, **same}


def test_growth_is_told_per_thousand_whatever_jumps_once() -> None:
    counts = list(range(1000, 5000, 100))
    assert slope_per_1000(counts, [300 + count * 0.002 for count in counts]) == pytest.approx(2.0)
    assert slope_per_1000(counts, [300.0 + 9 * (count == 3000) for count in counts]) == 0


# Peers


def order(**wanted: Any) -> Order:
    return Order(Wanted(**tiny(**wanted)), asyncio.get_running_loop().create_future())


def test_equal_requests_are_grouped_in_order_of_arrival_up_to_a_size() -> None:
    async def grouped() -> list[list[int]]:
        orders = [order(seed=0), order(seed=1, steps=3), order(seed=2), order(seed=3, guidance_scale=2.0)]
        orders += [order(seed=4, size="32x16"), order(seed=5, steps=3), order(seed=6, n=MOST_PICTURES)]
        return [[each.wanted.seed for each in group] for group in group_equal([*orders, order(seed=7)])]

    assert asyncio.run(grouped()) == [[0, 2], [1, 5], [3], [4], [6], [7]]


def test_peers_draw_what_the_sampler_draws(tiny_pipelines: dict[int, Path]) -> None:
    directory = tiny_pipelines[0]
    bodies = [tiny(seed=9, n=2), tiny(prompt="a blue square"), tiny(guidance_scale=1.0), tiny(steps=4, n=3)]
    parts = load_parts(directory)
    expected = [draw(parts, rows_of(body)) for body in bodies]

    async def one_by_one() -> list[list[bytes]]:
        transport = httpx.ASGITransport(app=make_app(OneByOne(str(directory))))
        async with httpx.AsyncClient(transport=transport, base_url="http://peer") as client:
            answers = [await client.post(GENERATIONS_ROUTE, json=body) for body in bodies]
        return [[base64.b64decode(each["b64_json"]) for each in answer.json()["data"]] for answer in answers]

    async def grouped() -> list[list[bytes]]:
        peer, orders = Grouped(str(directory)), [order(**body) for body in bodies]
        await peer.draw_groups(orders)
        return [[png(picture) for picture in each.drawn.result()] for each in orders]

    for answers in (asyncio.run(one_by_one()), asyncio.run(grouped())):
        # Two requests share a call in the second: values move by about 1e-6, which can turn one rounding.
        assert max(map(largest_difference, answers, expected)) <= 1
        assert [len(answer) for answer in answers] == [2, 1, 1, 3]


def test_a_failing_group_fails_its_own_requests(tiny_pipelines: dict[int, Path]) -> None:
    async def draw_both() -> tuple[BaseException | None, int]:
        peer, orders = Grouped(str(tiny_pipelines[0])), [order(size="17x16"), order()]
        await peer.draw_groups(orders)
        return orders[0].drawn.exception(), len(orders[1].drawn.result())

    error, drawn = asyncio.run(draw_both())
    assert isinstance(error, ValueError) and "divisible by 8" in str(error)
    assert drawn == 1


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def test_differences_are_found_and_missing_pictures_are_the_largest() -> None:
    black = Image.new("RGB", (4, 4))
    one_off = Image.fromarray(np.asarray(black) + np.uint8(1))
    assert largest_difference([png(black)], [black]) == 0
    assert largest_difference([png(black), png(one_off)], [black, black]) == 1
    assert largest_difference([png(black)], [black, black]) == 255
    assert largest_difference([png(black)], [Image.new("RGB", (8, 4))]) == 255


@pytest.mark.slow  # Ray, its proxy and two replicas start: most of a minute
@pytest.mark.timeout(400)
def test_served_peers_answer_many_at_once(tiny_pipelines: dict[int, Path]) -> None:
    bodies = [tiny(seed=seed, steps=2 + seed % 2, n=1 + 3 * (seed == 5)) for seed in range(12)]
    parts = load_parts(tiny_pipelines[0])
    expected = [draw(parts, rows_of(body)) for body in bodies]
    with (
        local_session(PlacementSection(workers=1, cpus_per_worker=1)),
        served_peers(str(tiny_pipelines[0]), 0.5) as urls,
    ):
        for url in urls.values():
            answers, elapsed_s = asyncio.run(ask_all(url + GENERATIONS_ROUTE, bodies, 12))
            assert [answer.error for answer in answers] == [""] * 12 and elapsed_s > 0
            assert max(largest_difference(a.pictures, own) for a, own in zip(answers, expected, strict=True)) <= 1


# Tables


def results(fresco: Sequence[float] = (6.0, 6.2), growth: float = 0.1, p95: float = 1.0) -> Results:
    rates = {"one-by-one": [2.0, 2.1], "grouped": [2.2, 2.2], "fresco": list(fresco)}
    latency = {"p50": 0.5, "p90": 0.8, "p95": p95, "p99": 2.0, "max": 3.0, "requests": 80, "late": 0.004}
    latencies = {"grouped": {**latency, "p95": 2.0}, "fresco": latency}
    memory = MemoryCourse([1500, 3000, 5000], [500.0, 500.1, 500.2], growth, 60.0)
    idle = {"sampler": 0.12, "request": 0.13, "cost": 0.011, "fastest": 0.01}
    reached = Saturation(rates, {"one-by-one": [0.9, 0.9], "grouped": [0.8, 0.8], "fresco": [0.3, 0.25]})
    return Results({"grouped": 1, "fresco": 0}, reached, reached, 1.5, latencies, idle, memory)


def test_tables_hold_the_numbers_and_every_target_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(results())
    told = capsys.readouterr().out
    assert "| fresco | 6.10 | 1.00 (1.00 to 1.00) | 0.275 |" in told
    assert "| one-by-one | 2.05 | 2.98 (2.95 to 3.00) | 0.900 |" in told
    assert "| fresco | 80 | 0.50 | 0.80 | 1.00 | 2.00 | 3.00 |" in told and "at most 4 ms after" in told
    assert "| through the endpoint | 130.0 |" in told and "| 5000 | 500.2 |" in told
    assert told.count("| met |") == 6 and "missed" not in told


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        (results(fresco=(4.9, 5.0)), "2.5x one-by-one"),
        (results(growth=1.5), "1,000 requests"),
        (results(p95=1.5), "p95 at 70%"),
        (replace(results(), idle={"sampler": 0.1, "request": 0.13, "cost": 0.03, "fastest": 0.03}), "idle request"),
        (replace(results(), differences={"grouped": 2, "fresco": 0}), "diffusers' pictures"),
    ],
)
def test_a_target_that_is_missed_is_named(changed: Results, missed: str) -> None:
    (verdict,) = [verdict for verdict in judge(changed) if not verdict.met]
    assert missed in verdict.target


# The soak test's stories and verdicts


def story(began: float, *kinds: Kind, version: int = 1, seconds: float = 1.0) -> Story:
    """A request whose attempts follow each other without a pause."""
    attempts = [
        Attempt(began + seconds * index, began + seconds * (index + 1), kind, FULL[kind])
        for index, kind in enumerate(kinds)
    ]
    told = Story(tiny(), rude="left" in kinds, due=began, attempts=attempts)
    if told.drawn:
        told.version, told.seeds, told.request_id = version, (4,), f"soak_{began}"
        told.pictures = (signed({"request_id": told.request_id, "seed": 4, "model_version": version}),)
    return told


@functools.cache
def signer() -> Signer:
    return open_signer(Path(tempfile.mkdtemp(prefix="fresco-test-keys-")))


def signed(facts: dict[str, Any]) -> bytes:
    return encode(Image.new("RGB", (8, 8)), "png", 0, facts, signer())


def held(log: Log, redrawn: Sequence[int] = (0, 1), left_behind: int = 0) -> dict[str, bool | None]:
    keys = {signer().key_id: signer().key.public_key()}
    return {check.claim: check.held for check in judge_soak(log, redrawn, keys, left_behind)}


def broken(log: Log, redrawn: Sequence[int] = (0, 1), left_behind: int = 0) -> list[str]:
    return [claim for claim, is_held in held(log, redrawn, left_behind).items() if is_held is not True]


def quiet_log() -> Log:
    stories = [story(0.0, "drawn"), story(9.5, "clear", "drawn"), story(12.0, "clear", "drawn"), story(30.0, "left")]
    stories += [story(41.0, "drawn", version=2), story(70.0, "drawn", version=2)]
    samples = [Sample(float(at), 500.0, {"fresco serve": 400.0, "Ray": 500.0}) for at in range(0, 80, 5)]
    return Log(stories, [Kill(10.0, 20.0)], [Swap(40.0, 2)], samples, rows_left=0)


def test_a_run_in_which_all_went_well_holds_every_claim() -> None:
    assert broken(quiet_log()) == []
    hit, waiting, other = sort_errors(quiet_log())
    assert (list(hit), len(waiting), other) == ([1, 2], 0, []), "12 s began while the proxy still took it for alive"


@pytest.mark.parametrize(
    ("added", "claim"),
    [
        (story(50.0, "unclear", "drawn", version=2), "no request but those on a killed replica sees an error"),
        (story(50.0, "final"), "every patient request is drawn"),
        (story(9.0, "clear", "clear", "drawn"), "those on it see one error each"),
        (story(9.0, "unclear", "drawn"), "these errors are clear"),
        (story(13.0, "unclear", "drawn"), "these errors are clear"),
        (story(60.0, "drawn", version=1), "the old version begins nothing"),
    ],
)
def test_one_bad_story_breaks_its_claim(added: Story, claim: str) -> None:
    log = quiet_log()
    log.stories.append(added)
    assert any(claim in found for found in broken(log))


def test_wrong_pictures_other_seeds_leaks_and_leftovers_are_told() -> None:
    assert broken(quiet_log(), redrawn=[0, 2]) == ["no wrong picture"]
    assert broken(quiet_log(), redrawn=[]) == ["no wrong picture"], "nothing compared shows nothing"
    assert broken(quiet_log(), left_behind=1) == ["no process is left behind"]
    log = quiet_log()
    log.stories[0].seeds = (5,)
    signature = "every picture is signed for its own request, seed and version"
    assert broken(log) == [signature]
    log = quiet_log()
    log.stories[0].pictures = log.stories[1].pictures
    assert broken(log) == [signature], "the picture of another request"
    log = quiet_log()
    log.rows_left = 1
    assert broken(log) == ["nothing is drawn for those who left"]
    log.rows_left = None
    assert broken(log) == ["nothing is drawn for those who left"], "nobody told"
    log = quiet_log()
    log.stories.append(story(14.0, "clear", "drawn"))
    assert broken(log) == [], "none was ready"
    log.replicas = 2
    assert broken(log) == ["no request but those on a killed replica sees an error"], "another one was ready"
    log = quiet_log()
    log.samples = [Sample(float(at), 500.0, {"fresco serve": 400.0, "Ray": 500.0 + at / 10}) for at in range(0, 80, 5)]
    assert growth_mib(log.samples, "Ray") == pytest.approx(60.0)
    assert broken(log) == ["Ray grows at most 40 MiB in ten minutes"]
    log.samples = []
    assert held(log)["Ray grows at most 40 MiB in ten minutes"] is None


def test_swaps_that_nobody_follows_are_not_shown_rather_than_held() -> None:
    log = quiet_log()
    log.stories = [each for each in log.stories if each.version != 2]
    assert follow_times(log) == [None]
    assert held(log)["1 swaps under load are followed"] is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (httpx.Response(503, json={"error": {"message": "m", "type": "t", "code": "c"}}), ("clear", "503 c")),
        (httpx.Response(400, json={"error": {"message": "m", "type": "t", "code": "c"}}), ("final", "400 c")),
        (httpx.Response(500, text="Internal Server Error"), ("unclear", "500 not in OpenAI's shape: ")),
        (httpx.Response(500, json=["error"]), ("unclear", "500 not in OpenAI's shape: ")),
        (httpx.Response(404, text="Not Found"), ("final", "404 not in OpenAI's shape: ")),
    ],
)
def test_errors_are_read_for_how_clear_they_are(answer: httpx.Response, expected: tuple[Kind, str]) -> None:
    kind, detail = read_error(answer)
    assert kind == expected[0] and detail.startswith(expected[1])


def test_patient_clients_insist_and_rude_ones_hang_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, int] = {}

    cancelled = asyncio.Event()

    async def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            cancelled.set()
            return httpx.Response(200, json={})
        seed = int(httpx.Response(200, content=request.content).json()["seed"])
        asked[seed] = asked.get(seed, 0) + 1
        if seed == 2:
            await asyncio.sleep(60)
        if seed == 3:
            await cancelled.wait()
            return httpx.Response(499, json={"error": {"message": "m", "type": "t", "code": "request_cancelled"}})
        if asked[seed] == 1:
            error = {"message": "m", "type": "server_error", "code": "model_loading"}
            return httpx.Response(503, json={"error": error}, headers={"Retry-After": "0"})
        picture = base64.b64encode(b"png").decode()
        return httpx.Response(200, json={"data": [{"b64_json": picture}], "seeds": [seed], "model_version": 7})

    client = httpx.AsyncClient(transport=httpx.MockTransport(respond))
    monkeypatch.setattr("benchmarks.soak_traffic.make_client", lambda: client)
    monkeypatch.setattr("benchmarks.soak_traffic.HANG_UP_S", (0.01, 0.02))
    monkeypatch.setattr("benchmarks.soak_traffic.FORMS", (("plain", 1.0),))
    stories: list[Story] = []
    for seed, rude_share, cancel_share in ((1, 0.0, 0.0), (2, 1.0, 0.0), (3, 1.0, 1.0)):
        client = httpx.AsyncClient(transport=httpx.MockTransport(respond))
        arrivals = [Arrival(0.0, tiny(seed=seed))]
        asyncio.run(send_traffic("http://endpoint", arrivals, rude_share, seed, stories, cancel_share))
    patient, rude, cancelling = stories
    assert [attempt.kind for attempt in patient.attempts] == ["clear", "drawn"]
    assert (patient.version, patient.seeds, patient.pictures) == (7, (1,), (b"png",))
    assert rude.left and not rude.drawn and [attempt.kind for attempt in rude.attempts] == ["left"]
    assert cancelling.left and cancelling.attempts[0].detail == ""


def test_every_form_of_request_is_drawn_by_a_real_endpoint_and_signed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories: list[Story] = []
    with endpoint(tiny_base, tmp_path, ServeSection(max_side_px=64)) as served:
        for form, _ in FORMS:
            monkeypatch.setattr("benchmarks.soak_traffic.FORMS", ((form, 1.0),))
            arrivals = [Arrival(0.0, tiny(size="64x64", n=2))]
            asyncio.run(send_traffic(served.url, arrivals, 0.0, 0, stories))
    assert [(told.form, told.attempts[-1]) for told in stories if not told.drawn] == []
    signature = "every picture is signed for its own request, seed and version"
    checks = judge_soak(Log(stories), (), read_public_keys(tmp_path / "keys"), 0)
    assert {check.claim: check.held for check in checks}[signature] is True


# Endings


@pytest.mark.slow  # an endpoint starts
@pytest.mark.timeout(600)
def test_soak_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    """As by `timeout 60 make soak`, which tells the process and at once its group."""
    options = ["--minutes", "5", "--swaps", "0", "--kill-every-s", "0", "--replicas", "1"]
    command, log = [sys.executable, "-m", "benchmarks.soak", *options], tmp_path / "log"
    with tempfile.TemporaryDirectory() as short:  # sockets of Ray lie below it
        folder, env = Path(short), {**os.environ, "TMPDIR": short, "PYTHONPATH": str(ROOT)}
        with running(command, log, env=env, cwd=ROOT) as process:
            wait_for(
                lambda: bool(list(folder.glob("*/workspace/endpoint.json"))), process, log, ServeSection().ready_limit_s
            )
            (record,) = folder.glob("*/workspace/endpoint.json")
            server = psutil.Process(json.loads(record.read_text())["pid"])
            started = [server, *server.children(recursive=True)]
            os.kill(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(120)
            assert psutil.wait_procs(started, 20)[1] == []
            assert not list(folder.glob("fresco-soak-*"))
