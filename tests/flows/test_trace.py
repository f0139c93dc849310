"""trace: the whole chain of a picture on a workspace with real records, and each way in which a part is missing."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.artifacts import append_journal, open_workspace, write_json_atomic, write_record
from cluster.champion import move_champion, roll_back
from cluster.registry import TAG_DATASET, TAG_MODEL_FINGERPRINT, TAG_RUN, Registry
from cluster.request_log import line_of
from cluster.request_watch import EndedRequest
from components.dataset import CARD, MANIFEST, MANIFEST_SCHEMA
from components.errors import InputError
from components.provenance import encode
from components.signing_key import open_signer
from flows import trace, verify
from flows.config import Config

REQUEST = "req_0123456789ab"
FIRST, SECOND = "fresco@aaaaaaaaaaaa", "fresco@bbbbbbbbbbbb"
REASONS = ["412 new pictures", "drift of images: 31 % of the arrivals"]


def draw(config: Config, path: Path, **facts: Any) -> Path:
    """Write a picture as the endpoint does; facts are those of the second version unless told."""
    drawn = {"seed": 7, "steps": 20, "guidance_scale": 3.0}
    every = {"model_version": 2, "dataset": SECOND, "run_id": "fresco-b", "request_id": REQUEST, **drawn, **facts}
    told = {key: value for key, value in every.items() if value != "left out"}
    signer = open_signer(open_workspace(config.workspace).keys)
    path.write_bytes(encode(Image.new("RGB", (8, 8), "red"), "png", 100, told, signer))
    return path


def lay_dataset(config: Config, dataset_id: str, pictures: int, parent: str | None, source: str, day: int) -> None:
    directory = open_workspace(config.workspace).dataset_dir(dataset_id)
    rows = [
        {
            "uri": f"{number}.png",
            "caption": "c",
            "split": "train",
            "sha256": f"{number:064d}",
            "source": "folder/one" if number < 10 else source,
            "first_seen": f"2026-11-{day if number >= 10 else 1:02d}T00:00:{number:02d}Z",
        }
        for number in range(pictures)
    ]
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), directory / MANIFEST)
    card = {
        "images": pictures,
        "created": f"2026-11-{day:02d}T01:00:00Z",
        "source": source,
        "rejected": {},
        "splits": {},
    }
    write_json_atomic(directory / CARD, {**card, **({"parent": parent} if parent else {})})
    write_record(directory, {"source": source})


@pytest.fixture
def told(config: Config) -> Config:
    """Two dataset versions, two runs, two champions; a cycle of the loop made the second of each."""
    workspace = open_workspace(config.workspace)
    registry = Registry(workspace)
    lay_dataset(config, FIRST, 10, None, "folder/one", 1)
    lay_dataset(config, SECOND, 14, FIRST, "s3://bucket/two", 9)
    for number, (run_id, dataset) in enumerate((("fresco-a", FIRST), ("fresco-b", SECOND)), 1):
        pipeline = workspace.run_dir(run_id) / "pipeline"
        pipeline.mkdir(parents=True)
        train = {"steps": 600, "freezing": "all", "global_batch": 32, "seed": 0, "learning_rate": {"denoiser": 0.002}}
        results = {"steps": 600, "eval_loss_first": 1.0, "eval_loss_best": 0.4, "eval_loss_last": 0.5, "seconds": 60}
        record = {"config": {"train": train}, "inputs": {"dataset": dataset, "base": "ba5e"}, "results": results}
        write_record(workspace.run_dir(run_id), {**record, "provenance": {"finished": "2026-11-10T00:00:00Z"}})
        if number == 2:
            append_journal(workspace, "monitor", verdict="drift", reasons=["images"], streams={})
            append_journal(workspace, "trigger", cycle="cycle-0001", decision="retrain", reasons=REASONS)
            numbers = {"run_id": run_id}
            append_journal(
                workspace, "stage", cycle="cycle-0001", stage="train", state="done", numbers=numbers, seconds=9.0
            )
        tags = {TAG_RUN: run_id, TAG_DATASET: dataset, TAG_MODEL_FINGERPRINT: f"weights{number}"}
        version = registry.register("fresco", pipeline, tags).number
        line = {
            "decision": "promote",
            "reasons": [f"reason {number}"],
            "checks": [{"name": "data"}],
            "version": version,
        }
        move_champion(registry, "fresco", version, {**line, "report": f"/r/promote-{version}.html", "run_id": run_id})
    return config


def log_request(
    config: Config, request_id: str = REQUEST, at: float | None = None, version: int = 2, name: str = "a"
) -> None:
    what = (request_id, "POST", "/v1/images/generations", 200, 1.25, None, False, 20, 400)
    ended = EndedRequest(*what, rows=1, version=str(version))
    folder = open_workspace(config.workspace).root / "serving" / "fresco"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"requests-{name}.jsonl").open("ab") as log:
        log.write(line_of(ended, time.time() if at is None else at))


def test_whole_chain_from_the_picture_to_its_arrivals(told: Config, tmp_path: Path, capsys: Any) -> None:
    log_request(told)
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert list(found) == ["image", "request", "version", "decision", "run", "dataset", "arrivals", "missing"]
    assert found["missing"] == [] and json.dumps(found)
    assert found["image"]["verdict"] == "valid"
    request = found["request"]
    assert (request["id"], request["seed"], request["steps"], request["seconds"]) == (REQUEST, 7, 20, 1.25)
    assert request["time"].endswith("Z") and request["route"] == "/v1/images/generations"
    assert (found["version"]["name"], found["version"]["number"], found["version"]["weights"]) == (
        "fresco",
        2,
        "weights2",
    )
    assert [one["until"] for one in found["version"]["served"]] == [None]
    decision = found["decision"]
    assert (decision["decision"], decision["reasons"], decision["forced"]) == ("promote", ["reason 2"], False)
    assert decision["report"] == "/r/promote-2.html" and decision["checks"] == [{"name": "data"}]
    assert (found["run"]["id"], found["run"]["steps"], found["run"]["eval_loss_last"]) == ("fresco-b", 600, 0.5)
    assert found["run"]["recipe"]["freezing"] == "all" and found["run"]["base"] == "ba5e"
    assert (found["dataset"]["images"], found["dataset"]["grown_from"]) == (14, [FIRST])
    arrivals = found["arrivals"]
    assert (arrivals["pictures"], arrivals["sources"], arrivals["grown"]) == (4, {"s3://bucket/two": 4}, True)
    assert (arrivals["first"], arrivals["last"]) == ("2026-11-09T00:00:10Z", "2026-11-09T00:00:13Z")
    assert (arrivals["trigger"]["cycle"], arrivals["trigger"]["reasons"]) == ("cycle-0001", REASONS)
    assert arrivals["trigger"]["monitor"]["verdict"] == "drift"
    printed = capsys.readouterr()
    order = ["image", "request", "version", "decision", "run", "dataset", "arrivals"]
    assert [line.split()[0] for line in printed.err.splitlines() if not line.startswith(" ")] == order
    assert printed.out == ""


def test_first_version_was_made_whole_and_by_a_person(told: Config, tmp_path: Path) -> None:
    file = draw(told, tmp_path / "a.png", model_version=1, run_id="fresco-a", dataset=FIRST)
    found = trace.run(told, str(file))
    assert found["decision"]["reasons"] == ["reason 1"]
    assert found["arrivals"] == {
        "grown": False,
        "pictures": 10,
        "sources": {"folder/one": 10},
        "first": "2026-11-01T00:00:00Z",
        "last": "2026-11-01T00:00:09Z",
        "trigger": None,
    }


def test_request_that_no_log_has_leaves_its_time_open(told: Config, tmp_path: Path) -> None:
    log_request(told, "req_of_somebody_else")
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert found["request"]["time"] is None and found["request"]["seed"] == 7
    assert found["missing"] == [f"no request log here has {REQUEST}, so when it was asked for is not known"]
    assert found["decision"]["reasons"] == ["reason 2"]


def test_name_that_two_requests_had_is_not_decided_by_guessing(told: Config, tmp_path: Path) -> None:
    log_request(told, at=1_800_000_000.0)
    log_request(told, at=1_800_000_060.0, name="b")
    log_request(told, at=1_800_000_120.0, version=1)  # another version drew that one
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert found["request"]["time"] is None
    assert (
        "2 requests called themselves req_0123456789ab (2027-01-15T08:00:00.000Z, 2027-01-15T08:01:00.000Z)"
        in found["missing"][0]
    )


def test_log_lines_that_are_torn_or_strange_are_passed_over(told: Config, tmp_path: Path) -> None:
    log_request(told)
    log = open_workspace(told.workspace).root / "serving" / "fresco" / "requests-a.jsonl"
    whole = log.read_bytes()
    rotated = log.with_name("requests-b.jsonl.1")
    rotated.write_bytes(whole[:-20] + b'\n["' + REQUEST.encode() + b'"]\n\xff' + REQUEST.encode() + b"\n")
    assert trace.run(told, str(draw(told, tmp_path / "a.png")))["request"]["seconds"] == 1.25


def test_version_that_served_twice_is_traced_to_the_promotion_it_served_under(told: Config, tmp_path: Path) -> None:
    workspace = open_workspace(told.workspace)
    log_request(told)
    roll_back(Registry(workspace), "fresco", {"reasons": ["users complain"]})
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert found["version"]["served"][0]["until"] is not None and found["decision"]["reasons"] == ["reason 2"]


def test_picture_of_a_challenger_says_that_its_version_was_not_champion(told: Config, tmp_path: Path) -> None:
    log_request(told, at=946_684_800.0)
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert found["missing"] == [
        "version 2 was not champion at 2000-01-01T00:00:00.000Z: it answered as challenger, or while the endpoint was"
        " still following the registry"
    ]


def test_version_number_of_another_model_is_not_taken_for_this_one(told: Config, tmp_path: Path) -> None:
    """As with --key: the signature is trusted, but version 2 is another model here."""
    file = draw(told, tmp_path / "a.png", run_id="fresco-z", dataset="fresco@zzzzzzzzzzzz")
    found = trace.run(told, str(file))
    assert (found["version"]["name"], found["decision"], found["run"], found["dataset"]) == (None, None, None, None)
    assert "version 2 of fresco here was made by run fresco-b" in found["missing"][1]
    assert (
        "run fresco-z has no record" in found["missing"][2] and "fresco@zzzzzzzzzzzz is not in" in found["missing"][3]
    )


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "", 3])
def test_names_in_a_record_never_leave_the_workspace(told: Config, tmp_path: Path, name: Any) -> None:
    found = trace.run(told, str(draw(told, tmp_path / "a.png", run_id=name, dataset=name)))
    assert (found["run"], found["dataset"], found["arrivals"]) == (None, None, None)


def test_version_of_another_registered_name_is_found(told: Config, tmp_path: Path) -> None:
    found = trace.run(told.model_copy(update={"name": "other"}), str(draw(told, tmp_path / "a.png")))
    assert found["version"]["name"] == "fresco" and found["decision"]["reasons"] == ["reason 2"]


def test_parts_that_were_deleted_are_said(told: Config, tmp_path: Path) -> None:
    workspace = open_workspace(told.workspace)
    log_request(told)
    (workspace.run_dir("fresco-b") / "record.json").unlink()
    (workspace.dataset_dir(FIRST) / MANIFEST).unlink()
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert found["run"] is None and found["arrivals"]["pictures"] is None
    assert found["arrivals"]["trigger"]["cycle"] == "cycle-0001"
    assert ["run fresco-b has no record" in found["missing"][0], "manifests of" in found["missing"][1]] == [True, True]
    workspace.journal.unlink()
    found = trace.run(told, str(draw(told, tmp_path / "a.png")))
    assert (
        found["decision"] is None and "the journal has no decision of the gate about version 2" in found["missing"][0]
    )


def test_torn_journal_is_read_as_far_as_it_goes(told: Config, tmp_path: Path) -> None:
    log_request(told)
    journal = open_workspace(told.workspace).journal
    journal.write_bytes(journal.read_bytes() + b'12\nnull\n{"event": 3}\n{"time": "2026')
    assert trace.run(told, str(draw(told, tmp_path / "a.png")))["missing"] == []


def test_unfinished_picture_ends_at_its_request(told: Config, tmp_path: Path) -> None:
    log_request(told)
    file = draw(told, tmp_path / "a.png", model_version="left out", run_id="left out", dataset="left out")
    found = trace.run(told, str(file))
    assert found["request"]["id"] == REQUEST and found["version"] is None
    assert "the picture is an unfinished one" in found["missing"][0]


def test_picture_that_is_not_this_workspaces_gets_one_clear_message(told: Config, tmp_path: Path, capsys: Any) -> None:
    file = draw(told, tmp_path / "a.png")
    edited = tmp_path / "edited.png"
    edited.write_bytes(file.read_bytes().replace(b"fresco-b", b"fresco-c"))
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    elsewhere = told.model_copy(update={"workspace": str(tmp_path / "elsewhere")})
    cases = [(told, edited, "changed"), (told, plain, "not signed"), (elsewhere, file, "unknown key")]
    for config, path, verdict in cases:
        capsys.readouterr()
        found = trace.run(config, str(path))
        assert found["image"]["verdict"] == verdict and len(found["missing"]) == 1
        assert all(found[step] is None for step in trace.STEPS)
        assert capsys.readouterr().err.splitlines() == [f"{path}: {verdict}: {found['missing'][0]}"]
    with pytest.raises(InputError, match="expected a picture at"):
        trace.run(told, str(tmp_path / "none.png"))


def test_key_that_was_given_is_trusted_for_a_trace_too(told: Config, tmp_path: Path) -> None:
    file = draw(told, tmp_path / "a.png")
    public = next(open_workspace(told.workspace).keys.glob("*.pub.pem"))
    elsewhere = told.model_copy(update={"workspace": str(tmp_path / "elsewhere")})
    found = trace.run(elsewhere, str(file), str(public))
    assert found["image"]["verdict"] == "valid" and found["version"]["name"] is None and found["run"] is None


def test_what_a_stranger_wrote_cannot_move_the_cursor(told: Config, tmp_path: Path, capsys: Any) -> None:
    append_journal(
        open_workspace(told.workspace), "trigger", cycle="cycle-0001", decision="retrain", reasons=["\x1b[2J\rvalid"]
    )
    trace.run(told, str(draw(told, tmp_path / "a.png")))
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\r" not in printed and "\\x1b[2J" in printed


def test_nothing_is_changed_by_a_trace(told: Config, tmp_path: Path) -> None:
    file = draw(told, tmp_path / "a.png")
    root = open_workspace(told.workspace).root
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "mlflow.db"}
    trace.run(told, str(file))
    assert {
        path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "mlflow.db"
    } == before


def test_command_prints_one_json_object(told: Config, tmp_path: Path) -> None:
    file = draw(told, tmp_path / "a.png")
    command = [sys.executable, "-m", "flows", "trace", str(file), "--workspace", told.workspace, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(verify.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["id"] == "fresco-b"
