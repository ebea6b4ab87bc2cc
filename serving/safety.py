"""What stands around the routes of a service: who may come in, and what is written down of it.

Made by each worker once its settings are read; the middleware is given it then.
"""

import atexit
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

from coterie.errors import CoterieError
from serving import journal, keys
from serving.access import Policy
from serving.journal import Journal
from serving.keys import Keyring, read_keys
from serving.metrics import Measures, lives
from serving.records import Records, to_standard_output
from serving.served import Served
from serving.settings import Settings, traced

__all__ = ["Safety", "check_safety", "metrics_folder"]

# Set for its workers by the process that starts them.
FOLDER_VARIABLE = "COTERIE_METRICS"
# What a service that was killed may have left, by the number of its process.
LEFT = re.compile(r"\.metrics-(\d+)-\w{8}")


class Safety:
    """The keys, counts, log and audit of one worker.

    Attributes:
        policy, records, journal: for the middleware.
        measures: for the engine, too.
    """

    def __init__(self, settings: Settings) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self.measures = Measures(Path(folder) if folder else None)
        self.journal = Journal(settings.state / journal.FILE_NAME)
        keyring = Keyring(_key_file(settings), required=settings.keys is not None)
        self.policy = Policy(keyring, settings.hosts, settings.origins)
        self._served: Served | None = None
        self.records = Records(
            self.measures, write=to_standard_output if settings.request_log else None, refresh=self._refresh
        )

    def watch(self, served: Served) -> None:
        """Tell of this engine from now on."""
        self._served = served
        self._refresh()

    def metrics(self) -> bytes:
        """What all workers have counted, up to the last answer of this one."""
        self.records.flush()
        return self.measures.text()

    def close(self) -> None:
        """Write down what is left."""
        self._served = None
        self.records.close()

    def _refresh(self) -> None:
        if self._served is None:
            return
        with self._served.held() as engine:
            try:
                items = len(engine.gallery().items.labels)
            except CoterieError:  # whoever asks next is told
                return
            self.measures.state(
                bundle=engine.manifest.id, name=engine.manifest.name, items=items, under_way=engine.under_way
            )


def check_safety(settings: Settings) -> None:
    """Find what would keep a worker from starting.

    Raises:
        CoterieError: the key file is missing or damaged, nothing can be written to the state folder, or requests cannot
            be traced.
    """
    if traced() and importlib.util.find_spec("opentelemetry.exporter") is None:
        raise CoterieError("COTERIE_OTEL needs OpenTelemetry's exporter, which is not here: install coterie[otel]")
    path = _key_file(settings)
    if settings.keys is not None or path.exists():
        read_keys(path)
    try:
        settings.state.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.state).close()
    except OSError as error:
        raise CoterieError(
            f"the state folder {settings.state} cannot be written to ({error.strerror}): choose another COTERIE_STATE"
        ) from error


def metrics_folder(settings: Settings) -> None:
    """Make the folder that the workers of this process will share their counts in, for as long as it runs."""
    for left in settings.state.iterdir():
        found = LEFT.fullmatch(left.name)
        if found and not lives(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f".metrics-{os.getpid()}-", dir=settings.state)
    os.environ[FOLDER_VARIABLE] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _key_file(settings: Settings) -> Path:
    return settings.keys or settings.state / keys.FILE_NAME
