"""What a server gives to one client, so that there is enough for the others."""

from dataclasses import dataclass, fields

from jaxhybrid.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError where a value is not positive; `grace_seconds` may be 0."""

    slots: int = 8  # texts at once, of each model
    context: int = 4096  # tokens of a prompt and its answer together
    max_new_tokens: int = 4096  # tokens of an answer
    queue: int = 64  # requests that wait for a slot, of each model
    request_seconds: float = 600  # from the request to the end of its answer, waiting included
    grace_seconds: float = 30  # that texts get to end in when the server is told to stop
    connections: int = 256
    header_seconds: float = 10  # for the head of a request
    body_seconds: float = 30  # for its body
    stuck_seconds: float = 30  # that a client may take nothing of what was sent to it

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or (value == 0 and field.name == "grace_seconds")):
                raise ConfigError(f"{field.name}={value}: use a positive value.")

    @property
    def body_bytes(self) -> int:
        """Of a request: room for a prompt as long as the context, as text or as token ids in JSON."""
        return 65_536 + 16 * self.context
