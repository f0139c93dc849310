"""How many pictures a second the engine draws at saturation, beside diffusers' pipeline with one request at a time.

The same mixed requests on the embedded base for both (steps 8 to 40, guidance 1 to 7, every eighth with n = 4), taking
turns in one process; then the seconds of one step by its number of rows: `engine.py --threads 1 --at-once 2`.
On a machine with other work, read the CPU seconds of `--threads 1`: they do not count the others' time. Where there is
a GPU, a Stable-Diffusion-1.5-sized model follows (`engine_large.py`), with `--compile` also compiled. `--tiny` shows in
seconds that all of it runs, on the CPU.
"""

import argparse
import queue
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from PIL import Image

from benchmarks import engine_large
from components.draw_requests import Done, DrawRequest, Event
from components.emblems import example
from components.engine_status import EngineLimits
from components.models import Parts, embedded_base, encode_text, family_named, load_parts
from components.row_batch import join, make_plan, step_rows
from components.sampler import PictureRequest
from components.step_batch import StepBatchEngine
from components.versions import Version

LONGEST_S = 600.0


def make_requests(num_requests: int, seed: int) -> list[tuple[PictureRequest, ...]]:
    chance = random.Random(seed)
    requests = []
    for number in range(num_requests):
        prompt = example("base", 21, number)[1]
        steps, guidance = chance.randint(8, 40), chance.choice([1.0, chance.uniform(1.5, 7.0), 3.0, 7.0])
        rows = 4 if number % 8 == 7 else 1
        seeds = range(1000 * number, 1000 * number + rows)
        requests.append(tuple(PictureRequest(prompt, seed, steps, guidance) for seed in seeds))
    return requests


def draw_one_by_one(pipeline: Any, requests: list[tuple[PictureRequest, ...]]) -> list[Image.Image]:
    pictures = []
    for rows in requests:
        pictures += pipeline(
            prompt=rows[0].prompt,
            num_inference_steps=rows[0].steps,
            guidance_scale=rows[0].guidance_scale,
            width=64,
            height=64,
            num_images_per_prompt=len(rows),
            generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        ).images
    return pictures


def draw_in_engine(engine: StepBatchEngine, requests: list[tuple[PictureRequest, ...]]) -> list[Image.Image]:
    events: queue.Queue[Event] = queue.Queue()
    # Ids repeat between rounds: a request is forgotten when it has ended.
    for number, rows in enumerate(requests):
        engine.submit(DrawRequest(str(number), rows), events.put)
    done: dict[int, Done] = {}
    while len(done) < len(requests):
        event = events.get(timeout=LONGEST_S)
        assert isinstance(event, Done), event
        done[int(event.request_id)] = event
    return [picture for number in range(len(requests)) for picture in done[number].pictures]


def step_times(parts: Parts, rows_per_step: list[int], repeats: int) -> None:
    version = Version("base", parts, 16)
    for guided in (False, True):
        for num_rows in rows_per_step:
            row = PictureRequest("a small red circle on a white background", 0, 20, 3.0 if guided else 1.0)
            batch = join(version.prepare(DrawRequest("r", (row,) * num_rows)))
            plan, seconds = make_plan(batch), []
            for _ in range(repeats):
                start = time.perf_counter()
                with torch.inference_mode():
                    step_rows(batch, plan, version.predict, version.family.guide)
                seconds.append(time.perf_counter() - start)
            best = min(seconds)
            print(
                f"  {num_rows:3d} pictures {'guided  ' if guided else 'unguided'}: {1e3 * best:7.1f} ms a step (median"
                f" {1e3 * statistics.median(seconds):7.1f}), {num_rows / best:6.0f} picture steps/s"
            )


def compare_with_pipeline(asked: argparse.Namespace) -> None:
    parts = load_parts(embedded_base())
    pipeline = family_named(parts.family).make_pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    engine = StepBatchEngine(EngineLimits(asked.max_batch_rows, max_waiting_rows=10_000, calls_at_once=asked.at_once))
    engine.load("base", parts)
    engine.start()
    encode_text(parts, ["warm up"])
    warm = make_requests(2, seed=0)
    draw_one_by_one(pipeline, warm)
    draw_in_engine(engine, warm)
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    for number in range(asked.rounds):
        requests = make_requests(asked.requests, seed=number + 1)
        start, start_cpu = time.perf_counter(), time.process_time()
        num_pictures = len(draw_one_by_one(pipeline, requests))
        middle, middle_cpu = time.perf_counter(), time.process_time()
        assert len(draw_in_engine(engine, requests)) == num_pictures
        end, end_cpu = time.perf_counter(), time.process_time()
        ratios.append((middle - start) / (end - middle))
        cpu_ratios.append((middle_cpu - start_cpu) / (end_cpu - middle_cpu))
        print(
            f"round {number + 1}: {num_pictures} pictures; pipeline {num_pictures / (middle - start):.2f} images/s"
            f" ({(middle_cpu - start_cpu) / num_pictures:.3f} CPU s each), engine {num_pictures / (end - middle):.2f}"
            f" images/s ({(end_cpu - middle_cpu) / num_pictures:.3f} CPU s each): {ratios[-1]:.2f} times the images/s,"
            f" {cpu_ratios[-1]:.2f} times the pictures for the CPU time",
            flush=True,
        )
    did = engine.counters
    print(
        f"medians {statistics.median(ratios):.2f} times and {statistics.median(cpu_ratios):.2f} times on"
        f" {asked.threads} threads; {did.row_steps / did.steps:.1f}"
        f" pictures a step, {did.call_rows / did.stepping_s:.0f} denoiser rows/s, decode"
        f" {1e3 * engine.status().decode_s:.1f} ms a picture"
    )
    engine.close()
    step_times(parts, [1, 2] if asked.tiny else [1, 2, 4, 8, 16, 32], asked.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=1, help="parts of a large call, made side by side")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch-rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure the large model compiled too")
    parser.add_argument("--tiny", action="store_true", help="as little of everything as shows that it runs")
    asked = parser.parse_args()
    if asked.tiny:
        asked.requests, asked.rounds, asked.repeats = 1, 1, 1
    torch.set_num_threads(asked.threads)
    compare_with_pipeline(asked)
    if asked.tiny:
        engine_large.measure(engine_large.TINY, asked.compile)
    elif torch.cuda.is_available():
        engine_large.measure(engine_large.LARGE, asked.compile)
    else:
        print("Stable-Diffusion-1.5-sized model at 512 px in bf16: not run, this machine has no CUDA device")


if __name__ == "__main__":
    main()
