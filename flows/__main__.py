"""The command line: `fresco VERB [options]`. Imports only the verb that was asked for; `--help` never imports torch.

Human text goes to stderr; with --json, stdout is exactly one JSON object. Exit codes: 0 the verb completed, whatever it
decided; 1 it failed; 2 the command or config is wrong and nothing was touched.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import say

app = typer.Typer(
    name="fresco",
    help="Keep a text-to-image model fresh: prepare data, fine-tune on Ray, measure, promote, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with the config tree.")]
Preset = Annotated[str | None, typer.Option(help="Named config: tiny_cpu (default), emblems_base, sd15_gpu, ...")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. train.steps=600. Repeatable.")]
WorkspaceUri = Annotated[
    str | None, typer.Option("--workspace", help="Folder for everything Fresco writes. [FRESCO_WORKSPACE]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and the steps; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """Run the command line and exit with its code."""
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/kfd").exists():
        # transformers imports DeepSpeed, which announces at every import that it looked for a GPU in vain.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except KeyboardInterrupt:
        say("\ninterrupted: the same command continues where it stopped")
        code = 1
    except typer._click.exceptions.ClickException as error:
        error.show()
        code = 2
    except Exception as error:  # the one place where a verb's errors end
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """Print one message for an error made on purpose, the whole trace for a bug; return the exit code."""
    if "no space left" in str(error).lower() or "disk is full" in str(error).lower():
        say(f"\nerror: the disk is full: {error}\nfree some space or choose another --workspace, then run it again")
        return 1
    code = getattr(type(error), "exit_code", None)
    if code is None:
        traceback.print_exception(error)
        say("\nerror: this is a bug in Fresco; please report it with the trace above")
        return 1
    say(f"\nerror: {error}")
    return int(code)


def _keep_stdout_clean() -> int:
    """Send whatever libraries print to stderr; return a descriptor of the real stdout for the one JSON object."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    return real


class Shared:
    """The options every verb has."""

    def __init__(
        self,
        config: str | None,
        preset: str | None,
        overrides: list[str] | None,
        workspace: str | None,
        dry_run: bool,
        as_json: bool,
    ) -> None:
        from flows.config import load_config

        uri = workspace or os.environ.get("FRESCO_WORKSPACE")
        self.config = load_config(config, preset, overrides, uri)
        self.dry_run, self.as_json = dry_run, as_json

    def run(self, verb: str, call: Callable[[Any], dict[str, Any]]) -> None:
        """Import `flows.<verb>`, run it (or tell its plan), print the JSON object when asked for."""
        stdout = _keep_stdout_clean()
        module = importlib.import_module(f"flows.{verb}")
        if self.dry_run:
            steps = module.plan(self.config) if hasattr(module, "plan") else [f"run fresco {verb} with this config"]
            result = {"verb": verb, "config": self.config.model_dump(), "steps": steps}
            if not self.as_json:
                import yaml

                say(yaml.safe_dump(result["config"], sort_keys=False))
                say("\n".join(f"{number}. {text}" for number, text in enumerate(steps, 1)))
        else:
            result = call(module)
        if self.as_json:
            os.write(stdout, (json.dumps(result, ensure_ascii=False, default=str) + "\n").encode())


@app.command()
def demo(
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the endpoint when the story is told.")] = False,
) -> None:
    """Tell the whole story on the built-in data: fine-tune, measure, promote, serve, draw."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("demo", lambda verb: verb.run(shared.config, stop=stop))


@app.command()
def prepare(
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Turn captioned images into a validated, split, encoded dataset version."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("prepare", lambda verb: verb.run(shared.config))


@app.command()
def train(
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fine-tune one recipe on Ray Train and DeepSpeed; prepares the data first when needed."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("train", lambda verb: verb.run(shared.config))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Diffusers folder, s3:// URI, run id, or models:/NAME@alias.")],
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    dataset: Annotated[str, typer.Option(help="NAME@FINGERPRINT; default: the data MODEL was trained on.")] = "",
) -> None:
    """Measure MODEL on the test split: scorecard with intervals, and an HTML report."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("evaluate", lambda verb: verb.run(shared.config, model, dataset))


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="Diffusers folder, s3:// URI, run id, or models:/NAME/VERSION.")],
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Register MODEL with its lineage and make it the champion; evaluates it first when needed."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("promote", lambda verb: verb.run(shared.config, model))


@app.command()
def serve(
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the endpoint answers.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the detached endpoint of this workspace.")] = False,
) -> None:
    """Serve the champion over HTTP in the shape of the OpenAI Images API; blocks until Ctrl-C."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("serve", lambda verb: verb.run(shared.config, detach=detach, stop=stop))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several prompts give several pictures.")],
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder, or the name of one .png file.")] = "pictures",
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures for each prompt.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Picture i of a prompt uses seed + i; default: chosen for you.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in px.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Draw here with MODEL instead of the endpoint.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Endpoint to ask; default: this workspace's.")] = None,
) -> None:
    """Draw pictures: from the workspace's endpoint, or locally with --model."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)

    def call(verb: Any) -> dict[str, Any]:
        wish = verb.Wish(n, seed, steps, guidance_scale, negative_prompt, size)
        result: dict[str, Any] = verb.run(shared.config, prompts, out, wish, model, url)
        return result

    shared.run("generate", call)


@app.command()
def status(
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Say what serves, why and since when."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("status", lambda verb: verb.run(shared.config))


@app.command()
def pretrain(
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Annotated[str, typer.Option("--out", help="Folder for the pipeline and the CLIP.")] = "build/pretrained",
) -> None:
    """Make an untrained base around a fresh autoencoder, tokenizer and CLIP (how the embedded base began)."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("pretrain", lambda verb: verb.run(shared.config, out))


@app.command("package")
def package_base(
    model: Annotated[str, typer.Argument(help="Run id or diffusers folder to store in half precision.")],
    out: Annotated[str, typer.Option("--out", help="New diffusers folder.")],
    config: ConfigFile = None,
    preset: Preset = None,
    set_: Overrides = None,
    workspace: WorkspaceUri = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Copy MODEL as a diffusers folder with fp16 weights: half the size, read as fp32 again."""
    shared = Shared(config, preset, set_, workspace, dry_run, as_json)
    shared.run("pretrain", lambda verb: verb.package(shared.config, model, out))


if __name__ == "__main__":
    main()
