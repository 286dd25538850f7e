"""Which :class:`Architecture` serves a type of model.

No other module outside `workers/models/` may depend on the type of a model: it asks the architecture.
"""

from collections.abc import Callable

from forecache.workers.models.dense.architecture import Dense
from forecache.workers.models.step.architecture import Architecture


def architecture_of(model_type: str) -> Architecture:
    """The architecture for a ``model_type`` of config.json: the one registered for it, else :class:`Dense`, which
    refuses at load what it would compute wrongly."""
    return ARCHITECTURES.get(model_type, Dense)()


def _deepseek_v4() -> Architecture:
    from forecache.workers.models.deepseek_v4.architecture import DeepseekV4  # only if such a model is served

    return DeepseekV4()


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {"deepseek_v4": _deepseek_v4}
"""By ``model_type``. Imports lie in the functions, so that a process loads only what it serves."""
