"""From a drawn picture to what is handed out: judged, retouched, encoded, signed.

Takes time, so it runs in the thread that takes an event, never in the engine's. Files say what drew them and never what
was asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from cluster.api_errors import refused_content
from cluster.painter_contract import Finished, Job, Partial
from cluster.role_metrics import Role, RoleTallies
from components.picture_statistics import picture_statistics
from components.provenance import encode
from components.retouch import retouch
from components.safety import Safety
from components.signing_key import Signer
from components.start_pictures import paste_kept
from flows.phases import Stopwatch

FACTS = ("model_version", "dataset", "run_id")
"""What every picture says of the weights that drew it."""


class Finisher:
    """Makes files of pictures, and counts in `tallies` what they look like."""

    def __init__(self, safety: Safety, signer: Signer, tallies: RoleTallies) -> None:
        self._safety, self._signer, self._tallies = safety, signer, tallies

    def judge(self, job: Job) -> None:
        """Refuse what the safety stage does not let through; ApiError names the category."""
        decision = self._safety.check_prompt(job.order.rows[0]["prompt"])
        if not decision.allowed:
            raise refused_content(decision.category)
        for decision in self._safety.check_pictures([job.upload.picture] if job.upload else []):
            if not decision.allowed:
                raise refused_content(decision.category, "image")

    def finish(
        self,
        job: Job,
        pictures: Sequence[Image.Image],
        info: Mapping[str, Any],
        role: Role,
        watch: Stopwatch | None = None,
    ) -> Finished:
        """Make the files of a request that was drawn; `info` is that of the weights that drew it."""
        pictures = [_with_kept(job, picture) for picture in pictures]
        for picture in pictures:
            self._tallies.picture(role, asdict(picture_statistics(picture)))
        refused = [decision for decision in self._safety.check_pictures(pictures) if not decision.allowed]
        if refused:
            self._tallies.refused(role, len(refused))
            raise refused_content(refused[0].category)
        facts = _facts(info)
        shown = [retouch(picture, job.order.postprocess) for picture in pictures]
        contents = tuple(self._file(job, row, picture, facts, retouched=True) for row, picture in enumerate(shown))
        phases = watch.stop() if watch is not None else ()
        return Finished(contents, f"{shown[0].width}x{shown[0].height}", facts, pictures, phases)

    def show(self, job: Job, row: int, index: int, picture: Image.Image, info: Mapping[str, Any]) -> Partial | None:
        """Make the file of an unfinished picture, `info` as in `finish`; None where it should not be seen."""
        picture = _with_kept(job, picture)
        if not self._safety.check_pictures([picture])[0].allowed:
            return None  # the finished picture is judged by itself
        return Partial(row, index, self._file(job, row, picture, _facts(info)))

    def _file(
        self, job: Job, index: int, picture: Image.Image, facts: Mapping[str, Any], retouched: bool = False
    ) -> bytes:
        order, row = job.order, job.order.rows[index]
        drawn_as = {key: row[key] for key in ("seed", "steps", "guidance_scale")}
        every = {**facts, "request_id": job.request_id, **drawn_as}
        if retouched and order.postprocess:
            every["postprocess"] = ", ".join(order.postprocess)
        return encode(picture, order.output_format, order.quality, every, self._signer)


def _facts(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: info.get(key) for key in FACTS}


def _with_kept(job: Job, picture: Image.Image) -> Image.Image:
    """Put back what a mask keeps of an edited picture: decoding alone would blur it."""
    if job.upload is None or job.upload.mask is None:
        return picture
    return paste_kept(picture, job.upload.picture, job.upload.mask)
