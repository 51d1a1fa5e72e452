"""The folder of one run: which files it holds, how it begins, and how it is found again."""

import json
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from bitorch_engine.cli.errors import RunError, UsageError
from bitorch_engine.cli.training import Epoch, Recipe


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; kept in its folder, so that resuming needs nothing else."""

    data: str
    image_size: int | None
    model: str
    w_bit: int
    a_bit: int | None
    g_bit: int | None
    first_w_bit: int
    learn_scale: bool
    skip: tuple[str, ...]
    recipe: Recipe

    @property
    def title(self) -> str:
        """Data, model and bits, fit for the name of a folder: ``digits-cnn-w4``."""
        bits = [f"{kind}{bits}" for kind, bits in zip("wag", (self.w_bit, self.a_bit, self.g_bit), strict=True) if bits]
        return f"{Path(self.data).resolve().stem}-{self.model.rpartition(':')[2]}-{''.join(bits)}"


class RunFolder:
    """Paths of the files of a run, and its records.

    settings.json      what was asked for             curves.png   loss, accuracy, changed codes
    metrics.jsonl      one line an epoch              weights.png  histogram of the codes of each layer
    model.safetensors  the model as deployed          report.html  all of it on one page
    checkpoint         all that is needed to resume
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self.checkpoint = path / "checkpoint"
        self.curves = path / "curves.png"
        self.weights = path / "weights.png"
        self.report = path / "report.html"

    @classmethod
    def choose(cls, path: Path | None, settings: Settings, *, overwrite: bool = False) -> "RunFolder":
        """The folder for a new run: ``path``, or ``runs/<title>`` with the first number that is free.

        Raises UsageError where there is something in it, unless it is to be overwritten.
        """
        if path is None:
            names = (settings.title if n == 1 else f"{settings.title}-{n}" for n in count(1))
            path = next(path for name in names if not (path := Path("runs") / name).exists())
        if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
            raise UsageError(f"{path} is there already; choose another --out, or --resume {path}, or --overwrite.")
        return cls(path)

    def begin(self, settings: Settings) -> None:
        """Make the folder, remove the files of an earlier run, and no others, and write down the settings."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in set(vars(self).values()) - {self.path}:
                file.unlink(missing_ok=True)
            self.settings.write_text(json.dumps(asdict(settings), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"cannot begin a run in {self.path}: {error.strerror}; choose another --out.") from None

    def read_settings(self) -> Settings:
        """What the run was asked for. Raises UsageError where this is not the folder of a run."""
        try:
            stored = json.loads(self.settings.read_text())
            return Settings(**stored | {"recipe": Recipe(**stored["recipe"]), "skip": tuple(stored["skip"])})
        except FileNotFoundError:
            raise UsageError(f"{self.path} is not the folder of a run: it has no {self.settings.name}.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{self.settings} is damaged or of another version: {error}") from None

    def append(self, epoch: Epoch) -> None:
        """Add a line to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(asdict(epoch)) + "\n")

    def epochs(self) -> list[Epoch]:
        """The epochs recorded so far."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return [Epoch(**json.loads(line)) for line in lines]

    def keep_epochs(self, done: int) -> None:
        """Forget what was recorded after ``done`` epochs: a run that was killed may be ahead of its checkpoint."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        self.metrics.write_text("".join(lines[:done]))
