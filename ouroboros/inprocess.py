"""An engine for papermill that executes a notebook in this process: a kernel of its own takes seconds to start, and
a profile has eleven notebooks. The user's configuration of IPython is never read.
"""

import base64

import pandas as pd
from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines
from traitlets.config import Config

ENGINE = "in process"
COLUMNS = 20  # of a table that are shown, as in a kernel: in a terminal pandas would ask for its width


class _Quiet(DisplayHook):
    """Keeps a cell's last value without printing it."""

    def __call__(self, result=None):
        self.fill_exec_result(result)


class InProcess(Engine):
    """Cells run one after the other in an IPython shell; the first that fails ends the notebook.

    Papermill isn't told of each cell's start and end: it would write the whole notebook both times.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **_):
        """Execute `nb_man`'s notebook, whose code is this Python's whatever the kernel is called."""
        shell = InteractiveShell.instance(displayhook_class=_Quiet, config=Config(HistoryManager={"enabled": False}))
        with pd.option_context("display.max_columns", COLUMNS):
            code = [(index, cell) for index, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
            for count, (index, cell) in enumerate(code, 1):
                if not _execute(shell, cell, count):
                    nb_man.cell_exception(cell, index)
                    break
        shell.restore_sys_module_state()
        InteractiveShell.clear_instance()


def _execute(shell: InteractiveShell, cell, count: int) -> bool:
    """Run a cell and put what it shows below it; whether it ran to its end."""
    with capture_output() as shown:
        result = shell.run_cell(cell.source, store_history=False)
    cell.execution_count, cell.outputs = count, []
    for name, text in (("stdout", shown.stdout), ("stderr", shown.stderr)):
        if text and result.success:
            cell.outputs.append(new_output("stream", name=name, text=text))
    for rich in shown.outputs:
        cell.outputs.append(new_output("display_data", data=_text(rich.data), metadata=rich.metadata or {}))
    if not result.success:
        error = result.error_in_exec or result.error_before_exec
        cell.outputs.append(new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[]))
    elif result.result is not None:
        data, metadata = shell.display_formatter.format(result.result)
        cell.outputs.append(new_output("execute_result", data=_text(data), metadata=metadata, execution_count=count))
    return result.success


def _text(data: dict) -> dict:
    """A display's bundle as JSON holds it: pictures in base64."""
    return {kind: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for kind, value in data.items()}


papermill_engines.register(ENGINE, InProcess)
