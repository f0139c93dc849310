"""The command line: `fresco VERB [options]`. Imports only the verb that was asked for; `--help` never imports torch.

Human text goes to stderr; with --json, stdout is exactly one JSON object. Exit codes: 0 the verb completed, whatever it
decided; 1 it failed; 2 the command or config is wrong and nothing was touched.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.signals import ended_by_signals
from flows.command import as_command
from flows.console import explain, keep_stdout_clean, say

INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt
app = typer.Typer(
    name="fresco",
    help="Keep a text-to-image model fresh: fine-tune on Ray, measure, promote, serve, watch for drift, retrain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line and exit with its code."""
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/kfd").exists():
        # transformers imports DeepSpeed, which announces at every import that it looked for a GPU in vain.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with ended_by_signals():
            code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer._click.exceptions.ClickException as error:
        error.show()
        code = 2
    except Exception as error:  # the one place where a verb's errors end
        code = explain(error)
    if code == INTERRUPTED:
        say("\ninterrupted: the same command continues where it stopped")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


@dataclass(frozen=True)
class Shared:
    """The options that every verb takes."""

    config: Annotated[str | None, typer.Option("--config", help="YAML file: what differs from the defaults.")] = None
    preset: Annotated[
        str | None, typer.Option("--preset", help="Named config; tiny_cpu where neither this nor --config is given.")
    ] = None
    set: Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. train.steps=600. Repeatable.")] = None
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Folder or s3://bucket/prefix for everything. [FRESCO_WORKSPACE]")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the steps; touch nothing.")
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False

    def run(self, module: str, call: Callable[[Any, Any], dict[str, Any]]) -> None:
        """Import `flows.<module>`, make `call(module, config)` or tell its plan, print the JSON object if asked for."""
        from flows.config import load_config, told_config, with_overrides

        uri = self.workspace or os.environ.get("FRESCO_WORKSPACE")
        config = load_config(self.config, self.preset, self.set, uri)
        collector = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        if module == "serve" and collector and not config.serve.otlp_endpoint:
            config = with_overrides(config, {"serve.otlp_endpoint": collector})
        stdout = keep_stdout_clean()
        verb = importlib.import_module(f"flows.{module}")
        if self.dry_run:
            steps = verb.plan(config) if hasattr(verb, "plan") else [f"run fresco {module} with this config"]
            result = {"verb": module, "config": told_config(config.model_dump()), "steps": steps}
            if not self.as_json:
                import yaml

                say(yaml.safe_dump(result["config"], sort_keys=False))
                say("\n".join(f"{number}. {text}" for number, text in enumerate(steps, 1)))
        else:
            result = call(verb, config)
        if self.as_json:
            os.write(stdout, (json.dumps(result, ensure_ascii=False, default=str) + "\n").encode())


def verb(body: Callable[..., None]) -> Callable[..., None]:
    """Make `body(shared, ...)` a command of this program."""
    return app.command()(as_command(Shared, body))


Model = Annotated[str, typer.Argument(help="Diffusers folder, s3:// URI, run id, models:/NAME@alias or NAME/N.")]


@verb
def demo(
    shared: Shared,
    stop: Annotated[bool, typer.Option("--stop", help="End the endpoint at the end; else it goes on.")] = False,
) -> None:
    """Tell the whole story on the built-in data: search, gate, serve; then the world drifts, and the loop answers."""
    shared.run("demo", lambda flow, config: flow.run(config, stop=stop))


@verb
def prepare(shared: Shared) -> None:
    """Turn captioned pictures into a checked, split, encoded dataset version."""
    shared.run("prepare", lambda flow, config: flow.run(config))


@verb
def train(shared: Shared) -> None:
    """Fine-tune one recipe on Ray Train and DeepSpeed; prepares the data first when needed."""
    shared.run("train", lambda flow, config: flow.run(config))


@verb
def tune(shared: Shared) -> None:
    """Search recipes with Ray Tune (TPE and early stopping), continue the winner to its full length, report."""
    shared.run("tune", lambda flow, config: flow.run(config))


@verb
def evaluate(
    shared: Shared,
    model: Model,
    dataset: Annotated[str, typer.Option(help="NAME@FINGERPRINT; default: the data MODEL was trained on.")] = "",
    against: Annotated[str, typer.Option(help="Another model to compare with; default: MODEL's base.")] = "",
) -> None:
    """Measure MODEL on the test split: scorecard with intervals, and an HTML report."""
    shared.run("evaluate", lambda flow, config: flow.run(config, model, dataset, against))


@verb
def promote(
    shared: Shared,
    model: Model,
    force: Annotated[bool, typer.Option("--force", help="Promote in spite of the gate; journaled as forced.")] = False,
    challenger: Annotated[bool, typer.Option("--challenger", help="Try it on traffic; nothing is decided.")] = False,
) -> None:
    """Compare MODEL with the champion and make it the champion if the gate lets it through."""
    shared.run("challenge" if challenger else "promote", lambda flow, config: flow.run(config, model, force))


@verb
def rollback(
    shared: Shared,
    reason: Annotated[str, typer.Option("--reason", help="Why; goes into the journal.")] = "",
    challenger: Annotated[bool, typer.Option("--challenger", help="End the challenger's trial instead.")] = False,
) -> None:
    """Make the previous champion the champion again."""
    action = "stop" if challenger else "run"
    shared.run("challenge" if challenger else "rollback", lambda flow, config: getattr(flow, action)(config, reason))


@verb
def history(shared: Shared) -> None:
    """Say which version served when, and on what evidence."""
    shared.run("history", lambda flow, config: flow.run(config))


@verb
def monitor(shared: Shared) -> None:
    """Say whether arrivals or served prompts have drifted from what the champion knows; report with pictures."""
    shared.run("monitor", lambda flow, config: flow.run(config, wait=True))


@verb
def serve(
    shared: Shared,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the endpoint answers.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the endpoint of this workspace, detached or not.")] = False,
    new_key: Annotated[str, typer.Option("--new-key", help="Make a key in serve.api_keys_file, show it once.")] = "",
) -> None:
    """Serve the champion over HTTP in the shape of the OpenAI Images API, until Ctrl-C or, with --detach, --stop."""

    def call(flow: Any, config: Any) -> Any:
        return flow.make_key(config, new_key) if new_key else flow.run(config, detach=detach, stop=stop)

    shared.run("serve", call)


@verb
def generate(
    shared: Shared,
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several prompts give several pictures.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder, or the name of one .png file.")] = "pictures",
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures for each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Picture i of a prompt uses seed + i; default: any.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="How hard the prompt pulls.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in px.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Draw here with MODEL instead of the endpoint.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Endpoint to ask; default: this workspace's.")] = None,
) -> None:
    """Draw pictures: from the workspace's endpoint, or locally with --model. [FRESCO_API_KEY]"""

    def call(flow: Any, config: Any) -> dict[str, Any]:
        wish = flow.Wish(n, seed, steps, guidance_scale, negative_prompt, size, os.environ.get("FRESCO_API_KEY"))
        result: dict[str, Any] = flow.run(config, prompts, out, wish, model, url)
        return result

    shared.run("generate", call)


@verb
def load(
    shared: Shared,
    urls: Annotated[list[str], typer.Argument(help="One URL, or two to compare.")],
    rate: Annotated[float, typer.Option("--rate", help="Requests a second, on average.")] = 1.0,
    seconds: Annotated[float, typer.Option("--seconds", help="How long requests arrive.")] = 60.0,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds within which a picture counts.")] = 30.0,
    sizes: Annotated[str, typer.Option("--sizes", help="WIDTHxHEIGHT or auto, with commas between.")] = "auto",
    steps: Annotated[str, typer.Option("--steps", help="LOWEST-HIGHEST number of denoising steps.")] = "8-40",
    seed: Annotated[int, typer.Option("--seed", help="Draws arrivals and requests.")] = 0,
) -> None:
    """Send the same random load to one endpoint or two: throughput, latency, errors, goodput. [FRESCO_API_KEY]"""

    def call(flow: Any, config: Any) -> dict[str, Any]:
        mix = flow.make_mix(rate, seconds, sizes, steps, seed)
        result: dict[str, Any] = flow.run(config, urls, mix, deadline, api_key=os.environ.get("FRESCO_API_KEY"))
        return result

    shared.run("load", call)


@verb
def verify(
    shared: Shared,
    file: Annotated[str, typer.Argument(help="A PNG, JPEG or WebP file.")],
    key: Annotated[str | None, typer.Option("--key", help="Public key to trust; default: the workspace's.")] = None,
) -> None:
    """Say whether FILE was drawn by this workspace's endpoint and is unchanged since."""
    shared.run("verify", lambda flow, config: flow.run(config, file, key))


@verb
def retrain(
    shared: Shared,
    once: Annotated[bool, typer.Option("--once", help="One decision, and its cycle; for cron and the like.")] = False,
    force: Annotated[bool, typer.Option("--force", help="A trigger by hand, now.")] = False,
) -> None:
    """The standing loop: look at what arrives, decide, retrain, promote, swap, roll back; safe to kill."""
    shared.run("retrain", lambda flow, config: flow.run(config, once, force))


@verb
def trace(
    shared: Shared,
    file: Annotated[str, typer.Argument(help="A picture that the endpoint drew: PNG, JPEG or WebP.")],
    key: Annotated[str | None, typer.Option("--key", help="Public key to trust; default: the workspace's.")] = None,
) -> None:
    """Tell where FILE comes from: request, model version, decision, run, dataset version, arrivals."""
    shared.run("trace", lambda flow, config: flow.run(config, file, key))


@verb
def timeline(shared: Shared) -> None:
    """Write a page with the whole story: data, drift, triggers, cycles, decisions, who served when."""
    shared.run("timeline", lambda flow, config: flow.run(config))


@verb
def status(shared: Shared) -> None:
    """Say what serves, why and since when, what the loop does, and the last decisions."""
    shared.run("status", lambda flow, config: flow.run(config))


@verb
def pretrain(
    shared: Shared,
    out: Annotated[str, typer.Option("--out", help="Folder for the pipeline and the CLIP.")] = "build/pretrained",
) -> None:
    """Make an untrained base around a fresh autoencoder, tokenizer and CLIP (how the embedded base began)."""
    shared.run("pretrain", lambda flow, config: flow.run(config, out))


@verb
def package(
    shared: Shared,
    model: Model,
    out: Annotated[str, typer.Option("--out", help="New diffusers folder.")] = "build/package",
) -> None:
    """Copy MODEL as a diffusers folder with fp16 weights: half the size, read as fp32 again."""
    shared.run("pretrain", lambda flow, config: flow.package(config, model, out))


if __name__ == "__main__":
    main()
