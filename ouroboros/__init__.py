"""Ouroboros (arXiv 2604.02051), reproduced: one shared transformer layer, modulated at every recurrence step.

`import ouroboros` is cheap, and analysis never imports torch: the public classes are loaded, and registered with the
Auto classes of transformers, when first asked for.
"""

__version__ = "0.1.0"
__all__ = ["OuroborosConfig", "OuroborosForCausalLM", "OuroborosModel"]


def __getattr__(name: str):  # PEP 562
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from .model import modeling
    from .release import from_release
    from .unroll import unroll

    modeling.OuroborosForCausalLM.from_release = classmethod(from_release)  # a foreign file's format
    modeling.OuroborosForCausalLM.unroll = unroll  # a foreign class
    globals().update({name: getattr(modeling, name) for name in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
