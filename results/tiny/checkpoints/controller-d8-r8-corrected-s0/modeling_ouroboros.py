"""The classes of this checkpoint are those of the package `ouroboros`."""

from ouroboros import OuroborosConfig, OuroborosModel, OuroborosForCausalLM  # noqa: F401
