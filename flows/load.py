"""fresco load: how fast is an endpoint, and what happens when more is asked of it than it can draw?

One load is drawn from a seed and sent to each URL in turn, so two servers get the same requests at the same times.
Open loop: nothing waits for an answer before the next request is sent. Prompts are the built-in captions.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx

from cluster.errors import EndpointError
from components.errors import InputError
from components.load_plan import Arrival, Mix, Outcome, draw_arrivals, summarise
from flows.config import Config
from flows.console import live, say, step
from flows.generate import HERE, bearer

LATE_S = 0.05
"""Requests that the generator sent later than this make its numbers doubtful."""
MOST_REQUESTS = 200_000
NO_CONNECTION = "no connection"
ROUTE = "/v1/images/generations"


def run(
    config: Config,
    urls: Sequence[str],
    mix: Mix,
    deadline_s: float = 30.0,
    timeout_s: float = 120.0,
    api_key: str | None = None,
) -> dict[str, Any]:
    """Send the load to one URL, or to two one after the other, and compare; EndpointError when nothing answers."""
    _check(urls, mix, deadline_s)
    arrivals = draw_arrivals(mix)
    if not arrivals:
        raise InputError(
            f"load expected at least one request, found none in {mix.duration_s:g} s at {mix.rate_per_s:g} a second;"
            " raise --rate or --seconds"
        )
    images = sum(arrival.body["n"] for arrival in arrivals)
    say(f"{len(arrivals)} requests for {images} pictures in {mix.duration_s:g} s, seed {mix.seed}")
    results = []
    for url in urls:
        step(f"load on {url}")
        address = str(url).rstrip("/").removesuffix("/v1") + ROUTE
        start = time.monotonic()
        outcomes = asyncio.run(send_all(address, arrivals, timeout_s, bearer(api_key)))
        results.append({"url": url, **summarise(outcomes, time.monotonic() - start, deadline_s)})
        _refuse_silence(url, outcomes)
        _say_result(results[-1])
    result: dict[str, Any] = {"seed": mix.seed, "results": results}
    if len(results) == 2:
        result["second_over_first"] = _compare(results[0], results[1])
    return result


def make_mix(rate_per_s: float, duration_s: float, sizes: str, steps: str, seed: int) -> Mix:
    """Read the options of the command line."""
    low, dash, high = steps.partition("-")
    if not low.isdigit() or (dash and not high.isdigit()):
        raise InputError(f"--steps expected LOWEST-HIGHEST, for example 8-40, found {steps!r}")
    named = tuple(size.strip() for size in sizes.split(",") if size.strip())
    if not named:
        raise InputError(f"--sizes expected WIDTHxHEIGHT or auto, with commas between, found {sizes!r}")
    return Mix(rate_per_s, duration_s, named, (int(low), int(high or low)), seed=seed)


async def send_all(
    address: str, arrivals: Sequence[Arrival], timeout_s: float, headers: dict[str, str]
) -> list[Outcome]:
    """Send every request when it is due, whatever became of those before; outcomes in the order of arrivals."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(timeout_s, pool=None)
    # A proxy named in the environment must not stand between this machine and itself.
    remote = httpx.URL(address).host not in HERE
    done = 0
    async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers, trust_env=remote) as client:
        start = time.monotonic()

        async def send(arrival: Arrival) -> Outcome:
            nonlocal done
            due = start + arrival.due_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            late_s = time.monotonic() - due
            num_images, error, version = await _ask(client, address, arrival.body)
            done += 1
            live(f"{done} of {len(arrivals)} answered after {time.monotonic() - start:.0f} s")
            return Outcome(time.monotonic() - due, late_s, num_images, error, version)

        outcomes = await asyncio.gather(*(send(arrival) for arrival in arrivals))
    live("")
    return list(outcomes)


async def _ask(client: httpx.AsyncClient, address: str, body: dict[str, Any]) -> tuple[int, str, str]:
    """Return (pictures, error, model version) of one request."""
    try:
        answer = await client.post(address, json=body)
        content = answer.json()
    except httpx.TimeoutException:
        return 0, "timeout", ""
    except httpx.ConnectError:
        return 0, NO_CONNECTION, ""
    except httpx.HTTPError as broken:
        return 0, f"broken connection: {type(broken).__name__}", ""
    except ValueError:
        return 0, f"{answer.status_code} not JSON", ""
    whole = content if isinstance(content, dict) else {}
    if answer.status_code != 200:
        refusal = whole.get("error")
        code = refusal.get("code") if isinstance(refusal, dict) else None
        return 0, f"{answer.status_code} {code or 'without a code'}", ""
    pictures = [picture for picture in whole.get("data") or [] if isinstance(picture, dict) and picture.get("b64_json")]
    error = "" if len(pictures) == body["n"] else f"200 with {len(pictures)} of {body['n']} pictures"
    return len(pictures), error, str(whole.get("model_version", ""))


def _check(urls: Sequence[str], mix: Mix, deadline_s: float) -> None:
    if not 1 <= len(urls) <= 2:
        raise InputError(f"load expected one URL or two to compare, found {len(urls)}")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"load expected URLs such as http://127.0.0.1:8000, found {url!r}")
    low, high = mix.steps
    numbers = {"--rate": mix.rate_per_s, "--seconds": mix.duration_s, "--deadline": deadline_s, "--steps": low}
    for option, value in numbers.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{option} expected a number above 0, found {value:g}")
    if low > high:
        raise InputError(f"--steps expected LOWEST-HIGHEST, found {low}-{high}")
    if mix.rate_per_s * mix.duration_s > MOST_REQUESTS:
        raise InputError(f"load expected up to {MOST_REQUESTS} requests, found more; lower --rate or --seconds")


def _refuse_silence(url: str, outcomes: Sequence[Outcome]) -> None:
    if all(outcome.error == NO_CONNECTION for outcome in outcomes):
        raise EndpointError(
            f"endpoint expected to answer at {url}, found no connection; is it running? (fresco status)"
        )


def _say_result(result: dict[str, Any]) -> None:
    latency = {name: "-" if value is None else f"{value:.2f}" for name, value in result["latency_s"].items()}
    say(f"  {result['succeeded']} of {result['requests']} requests drawn, {result['images_per_s']:.2f} images/s")
    say("  latency in s: " + ", ".join(f"{name} {value}" for name, value in latency.items()))
    in_time = f"{result['goodput_images_per_s']:.2f} images/s within {result['deadline_s']:g} s"
    say(f"  goodput: {in_time} (share of requests {result['in_time_share']:.2f})")
    for error, count in result["errors"].items():
        say(f"  error {error}: {count}")
    if result["most_late_s"] > LATE_S:
        say(f"  this machine sent requests up to {result['most_late_s']:.2f} s late: the latencies hold that too")


def _compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float | None]:
    """Ratios second / first; None where the first has nothing to divide by."""
    pairs = {key: (first[key], second[key]) for key in ("images_per_s", "goodput_images_per_s")}
    pairs |= {key: (first["latency_s"][key], second["latency_s"][key]) for key in first["latency_s"]}
    ratios = {key: b / a if a and b is not None else None for key, (a, b) in pairs.items()}
    told = ", ".join(f"{key} {'-' if ratio is None else f'{ratio:.2f}'}" for key, ratio in ratios.items())
    step("second divided by first")
    say(f"  {told}")
    return ratios
