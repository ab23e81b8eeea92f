"""Check of the libraries that training arguments need, before a model is loaded."""

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from ..errors import UsageError


def check_libraries(arguments: SFTConfig) -> None:
    """Create the trainer's trackers, optimiser and kernels as far as possible without a model.

    Raises:
        UsageError: a library is missing, or transformers does not accept a value.
    """
    for tracker in arguments.report_to or []:
        try:
            for kind in get_reporting_integration_callbacks([tracker]):
                kind()
        except Exception as error:  # every tracker's callback has its own errors
            raise UsageError(f"--report_to {tracker}: {error}") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise UsageError(f"--optim {arguments.optim.value}: {error}") from error
    except ValueError as error:
        if "model" not in str(error):  # else only the model is missing
            raise UsageError(f"--optim {arguments.optim.value}: {error}") from error
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UsageError("--use_liger_kernel needs the library liger-kernel: pip install liger-kernel")
