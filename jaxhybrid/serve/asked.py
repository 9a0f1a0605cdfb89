"""What requests ask for: OpenAI's parameters, those of the engine besides, and all others refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jaxhybrid.serve.errors import APIError

# Parameters of OpenAI's API that are not built here, and the values by which they ask for nothing.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (), "store": (False,),
    "service_tier": ("auto", "default"),
}  # fmt: skip
OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "refusal": (), "audio": (), "function_call": (), "tool_calls": ([],), "annotations": ([],),
}  # fmt: skip
CHARACTERS = 1000  # of a stop string


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def without(given: Any, not_built: dict[str, tuple[Any, ...]]) -> Any:
    """`given` without parameters that are not built, which must ask for nothing."""
    if not isinstance(given, dict):
        return given
    for name in not_built.keys() & given.keys():
        value = given[name]
        if value is not None and not any(type(value) is type(none) and value == none for none in not_built[name]):
            message = f"{name}={value!s:.100}: not built in this server; leave it out."
            raise APIError(400, message, "unsupported_parameter", name)
    return {name: value for name, value in given.items() if name not in not_built}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        return without(given, OF_MESSAGES)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(Strict):
    """What both endpoints take. None is as good as leaving a parameter out."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    # The engine's own, under the names that other servers have for them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    # Who asks: nothing depends on it.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        return without(given, NOT_BUILT)

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or any(not 0 < len(stop) <= CHARACTERS for stop in stops):
            message = f"stop: give at most 4 texts of 1 to {CHARACTERS} characters each."
            raise APIError(400, message, "invalid_value", "stop")
        return stops

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `Sampling` that are given."""
        given = self.model_dump(include={"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"})
        return {name: value for name, value in given.items() if value is not None}

    @property
    def has_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer; None: as many as there may be."""
        return self.max_tokens


class CompletionAsked(Asked):
    prompt: str | list[int] | list[str] | list[list[int]]

    @property
    def longest(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default for this endpoint

    @property
    def text(self) -> str | list[int]:
        """The prompt, as text or as tokens."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                message = f"prompt: {len(prompt)} prompts in one request; send one in each, all at the same time."
                raise APIError(400, message, "unsupported_parameter", "prompt")
            return prompt[0]
        return prompt


class ChatAsked(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def read[A: Asked](kind: type[A], body: bytes) -> A:
    """Raises APIError: the body is not JSON, or not what the endpoint takes; names the first parameter that is not."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        first = found[0]
        if first["type"] == "json_invalid":
            raise APIError(400, f"The body is no JSON: {first['msg']}.", "invalid_json") from error
        if not first["loc"]:
            raise APIError(400, "The body is no JSON object with the parameters in it.", "invalid_json") from error
        param = str(first["loc"][0])
        same = [one for one in found if one["loc"][0] == param]
        if first["type"] == "extra_forbidden":
            raise APIError(400, f"{param}: no parameter of this endpoint.", "unknown_parameter", param) from error
        told = "; or ".join(dict.fromkeys(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in same))
        missing = first["type"] == "missing"
        given = "" if missing else f" (given: {str(first['input'])[:100]})"
        code = "missing_parameter" if missing else "invalid_value"
        raise APIError(400, f"{told}{given}.", code, param) from error
    asked.stops  # noqa: B018 - refuses what pydantic cannot
    return asked
