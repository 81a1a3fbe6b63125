"""The names of everything in a run directory, and which format of them this version writes.

Whoever writes or reads a run's files takes their names from here.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

from lmcot.errors import UserError
from lmcot.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from lmcot.storage import Place

FORMAT: Final = 1
"""Version of the files in a run directory. A change that older readers would misread raises it."""
FORMAT_FILE: Final = "format.json"

CONFIG: Final = "config.yaml"
SETTINGS: Final = "settings.yaml"
"""The settings that `lmcot train --data` made, with comments; `CONFIG` has what the run used."""
STAGES: Final = "stages.json"
INPUTS: Final = "inputs.json"
SPENDING: Final = "spending.json"
ESTIMATE: Final = "estimate.json"
RATIONALES: Final = "rationales.jsonl"
RATIONALES_BEGUN: Final = "rationales.partial.jsonl"
DEMONSTRATIONS: Final = "demonstrations.jsonl"
FIRST_ANSWERS: Final = "first_answers.jsonl"
RATIONALES_TABLE: Final = "rationales.md"
METRICS: Final = "metrics.jsonl"
TENSORBOARD: Final = "tensorboard"
ROLLOUTS: Final = "rollouts"
SAMPLES: Final = "samples"
PREDICTIONS: Final = "predictions"
CHECKPOINTS: Final = "checkpoints"
TRIALS: Final = "trials"
SWEEP: Final = "sweep.json"
LOCK: Final = ".lock"

REPORT_JSON: Final = "report.json"
REPORT_TEXT: Final = "report.md"
ACCURACY_PICTURE: Final = "report.png"
COST_PICTURE: Final = "report-cost.png"
ASPECTS_PICTURE: Final = "report-aspects.png"

DISTILLED: Final = "distilled"
REJECTION: Final = "rejection"
REJECTION_ROUNDS: Final = "reject"
REFINED: Final = "refined"
BEST: Final = "best"
CARD: Final = "README.md"
"""The model card in a policy's folder."""
CRITIC: Final = "critic"

_ADAPTERS = "-adapters"
_STEP = re.compile(r"step-(\d{6,})\.jsonl")
_ROUND = re.compile(r"round-(\d+)\.jsonl")


def training_picture(stage: str) -> str:
    """Name of the picture of a stage's curves."""
    return f"{stage}.png"


def predictions_name(row: str) -> str:
    """Name of the file of one row's predictions, below `PREDICTIONS`."""
    return f"{row}.jsonl"


def rollouts_name(step: int) -> str:
    """Name of the file of one step's rollouts, below `ROLLOUTS`."""
    return f"step-{step:06d}.jsonl"


def samples_name(stage: str, step: int) -> str:
    """Name of the file of rationales that a validation showed, below `SAMPLES`."""
    return f"{stage}-step-{step:06d}.md"


def samples_step(stage: str, name: str) -> int | None:
    """The step of a file that `samples_name` named for this stage; None for any other file."""
    found = re.fullmatch(re.escape(stage) + r"-step-(\d{6,})\.md", name)
    return int(found[1]) if found else None


def round_name(number: int) -> str:
    """Name of the file of one round's rationales, below `REJECTION_ROUNDS`."""
    return f"round-{number}.jsonl"


def rollout_steps(folder: Place) -> list[int]:
    """The steps of which a ``rollouts`` folder holds rollouts, in ascending order."""
    found = (_STEP.fullmatch(path.name) for path in folder.glob("step-*.jsonl"))
    return sorted(int(name[1]) for name in found if name)


def rounds(folder: Place) -> list[int]:
    """The rounds of which a `REJECTION_ROUNDS` folder holds all rationales, in ascending order."""
    found = (_ROUND.fullmatch(path.name) for path in folder.glob("round-*.jsonl"))
    return sorted(int(name[1]) for name in found if name)


def adapters_folder(model: Place) -> Place:
    """Folder of the LoRA adapters that a model's folder was merged from."""
    return model.with_name(f"{model.name}{_ADAPTERS}")


def model_folder(name: str) -> str:
    """Name of the model's folder that a folder of adapters, or of a model, belongs to."""
    return name.removesuffix(_ADAPTERS)


def holds_model(folder: Place) -> bool:
    """Whether a folder holds a complete model in Hugging Face's format."""
    return (folder / "config.json").is_file()


def write_format(run: Path) -> None:
    """Records which format the files of a run directory have."""
    write_atomically(run / FORMAT_FILE, json.dumps({"format": FORMAT}) + "\n")


def check_format(run: Place) -> None:
    """Refuses a run directory whose files a newer lmcot has written.

    A directory without a record is of the first format.

    Raises:
        UserError: naming the format that was found and the newest that this version reads.
    """
    file = run / FORMAT_FILE
    try:
        found = json.loads(file.read_bytes())["format"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the file '{file}' is damaged ({error}): write {{\"format\": {FORMAT}}} into it if "
            "this version of lmcot made the run"
        ) from None
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(
            f"the files in '{run}' have format {found}, but this version of lmcot reads formats "
            f"up to {FORMAT}: upgrade lmcot, or use another run directory"
        )
