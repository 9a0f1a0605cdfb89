"""The layers the user names."""

from jaxhybrid.errors import ConfigError
from jaxhybrid.selection.choice import Choice, Given, Method, exactly
from jaxhybrid.settings.budget import check_layers


def choose(given: Given, count: int) -> Choice:
    """
    Raises:
        ConfigError: an index is out of range or named twice, or none is named.
    """
    layers = given.settings.layers or ()
    check_layers(layers, given.depth)
    repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if repeated:
        raise ConfigError(f"select.layers names {repeated} more than once.")
    if not layers:
        raise ConfigError("select.method=explicit needs select.layers, a list such as [2, 9, 16].")
    return exactly(layers)


METHODS = {"explicit": Method(choose, drawn=True)}
