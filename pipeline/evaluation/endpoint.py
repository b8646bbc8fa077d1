"""A minimal client of OpenAI-compatible chat endpoints: vLLM, llama.cpp, and the hosted ones.

One call, ``POST {base_url}/chat/completions``, many at a time. The API key comes from an
environment variable that the user names; it is never an argument, never logged and never part of a
message.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from pipeline.errors import InvalidInput, PipelineError
from pipeline.evaluation.generate import ChatPrompt

log = logging.getLogger(__name__)

_RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
_SHOWN: Final = 300
"""Characters of a response that a message shows."""


class EndpointFailed(PipelineError):
    """An endpoint did not answer, or answered what is no chat completion."""


class _Bearer(AuthBase):
    """Sets the key. Given at all, it keeps `requests` from sending what is in a .netrc file."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, and how patiently.

    Attributes:
        base_url: Up to and including the version, such as ``http://127.0.0.1:8000/v1``.
        model: As the endpoint names it.
        key_variable: Environment variable that holds the API key, or None to send none.
        num_parallel: Most requests under way at a time.
        timeout_s: Longest wait for a connection, and for each part of a response.
        attempts: Tries a prompt, the first included.
        backoff_s: Longest wait before the first retry; it doubles each time, up to 60 s. The wait
            itself is random below that ("full jitter"), so that many clients spread out.
        limit_field: What the endpoint calls the longest answer. Some newer models take
            ``max_completion_tokens`` alone.
    """

    base_url: str
    model: str
    key_variable: str | None = None
    num_parallel: int = 8
    timeout_s: float = 120.0
    attempts: int = 6
    backoff_s: float = 1.0
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(
                "endpoint: expected an address such as http://127.0.0.1:8000/v1, got "
                f"{parts.scheme or 'none'!r} as its scheme",
                kind="endpoint_address",
            )
        if parts.username or parts.password or parts.query:
            # Not shown: it may hold a secret.
            raise InvalidInput(
                f"endpoint {parts.hostname}: the address holds a user name, a password or a query; "
                "put the key in an environment variable and name that",
                kind="endpoint_address",
            )
        if self.key_variable and parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise InvalidInput(
                f"endpoint {parts.hostname}: the key from {self.key_variable} would be sent over "
                "http unencrypted; use https, or name no key where the endpoint needs none",
                kind="endpoint_unencrypted",
            )
        if self.num_parallel < 1 or self.attempts < 1:
            raise InvalidInput(
                f"endpoint {parts.hostname}: num_parallel {self.num_parallel} and attempts "
                f"{self.attempts}: expected at least 1 of each",
                kind="endpoint_option",
            )

    @property
    def url(self) -> str:
        """What is posted to."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def ask(
        self,
        prompts: Sequence[ChatPrompt],
        max_tokens: int = 512,
        temperature: float = 0.0,
        on_answer: Callable[[int, str], None] = lambda index, answer: None,
    ) -> list[str]:
        """Answer prompts, several at a time.

        Args:
            max_tokens: Longest answer.
            temperature: 0 is greedy, as far as the endpoint is deterministic at all.
            on_answer: Called with index and answer as each arrives, from any thread but one at a
                time: answers cost money, and are lost to the caller if a later one fails.

        Returns:
            One answer a prompt, in the given order. Empty where the endpoint returned no text or
            its filter withheld the answer.

        Raises:
            InvalidInput: The key's variable is not set, a prompt has a completion to begin with
                (which such endpoints cannot do), or the endpoint refused the key or the request.
            EndpointFailed: Still no answer after `attempts`, or the response is no completion.
        """
        key = self._key()
        for prompt in prompts:
            if prompt.completion:
                raise InvalidInput(
                    f"endpoint {self.url}: a prompt's answer is to begin with "
                    f"{prompt.completion!r}, which a chat endpoint cannot do; use a local model",
                    kind="endpoint_completion",
                )
        local = threading.local()
        lock = threading.Lock()
        stop = threading.Event()

        def one(index: int) -> str:
            # Connections are kept and used again, but a session is not safe to share.
            if not hasattr(local, "session"):
                local.session = requests.Session()
                # A proxy in the environment has no business with this machine's own endpoint.
                local.session.trust_env = not _is_loopback(urlsplit(self.base_url).hostname)
            body = {
                "model": self.model,
                "messages": _messages(prompts[index]),
                self.limit_field: max_tokens,
                "temperature": temperature,
            }
            answer = self._post(local.session, body, key, stop)
            with lock:
                on_answer(index, answer)
            return answer

        with ThreadPoolExecutor(min(self.num_parallel, max(1, len(prompts)))) as pool:
            futures = [pool.submit(one, index) for index in range(len(prompts))]
            try:
                done = wait(futures, return_when=FIRST_EXCEPTION).done
                # Told before the rest is stopped, so that this is the cause and no victim of it.
                failures = [failure for future in done if (failure := future.exception())]
            finally:
                # After an error or Ctrl-C no further answer is paid for.
                stop.set()
                for future in futures:
                    future.cancel()
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise InvalidInput(
                f"endpoint {self.url}: environment variable {self.key_variable} is "
                f"{'not an API key' if key else 'not set or empty'}; export it, or name another",
                kind="endpoint_key",
            )
        return key

    def _post(
        self,
        session: requests.Session,
        body: dict[str, Any],
        key: str | None,
        stop: threading.Event,
    ) -> str:
        reason = ""
        for attempt in range(1, self.attempts + 1):
            pause = random.uniform(0, min(60.0, self.backoff_s * 2 ** (attempt - 1)))
            try:
                response = session.post(
                    self.url,
                    json=body,
                    auth=_Bearer(key),
                    timeout=self.timeout_s,
                    # A redirect would carry prompts, and perhaps the key, to who knows where.
                    allow_redirects=False,
                )
            except (
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,
            ) as error:
                reason = f"{type(error).__name__}: {error}"
            except requests.RequestException as error:
                raise EndpointFailed(
                    _redacted(f"endpoint {self.url}: {type(error).__name__}: {error}", key),
                    kind="endpoint_request",
                ) from None
            else:
                if response.status_code not in _RETRIED:
                    return self._read(response, key)
                reason = f"status {response.status_code}: {_excerpt(response, key)}"
                pause = max(pause, _retry_after_s(response))
            if attempt < self.attempts:
                log.warning("endpoint retry", extra={"attempt": attempt, "pause_s": pause})
                stop.wait(pause)
            if stop.is_set():
                break
        raise EndpointFailed(
            _redacted(
                f"endpoint {self.url}: no answer after {attempt} attempts; the last: {reason}. "
                "See that it runs, or ask less at a time",
                key,
            ),
            kind="endpoint_unavailable",
        )

    def _read(self, response: requests.Response, key: str | None) -> str:
        status, shown = response.status_code, _excerpt(response, key)
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if status == 400 and _error_code(reply) == "content_filter":
            return ""
        if status in (401, 403):
            advice = (
                f"it refuses the key in {self.key_variable}; export the right one"
                if self.key_variable
                else "it wants an API key; name the environment variable that holds it"
            )
            raise InvalidInput(
                f"endpoint {self.url}: expected status 200, got {status}: {shown}: {advice}",
                kind="endpoint_key",
            )
        if status != 200:
            raise InvalidInput(
                f"endpoint {self.url}: expected status 200, got {status}: {shown}. "
                f"Check the address and the model's name, {self.model!r}",
                kind="endpoint_refused",
            )
        try:
            message = reply["choices"][0]["message"]
            content = message.get("content")
            # Some endpoints put a refusal in a field of its own.
            text = content if content is not None else message.get("refusal") or ""
        except (TypeError, KeyError, IndexError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise EndpointFailed(
                f"endpoint {self.url}: expected JSON with choices[0].message.content, got {shown}; "
                "is it an OpenAI-compatible endpoint?",
                kind="endpoint_response",
            )
        return text.strip()


def _messages(prompt: ChatPrompt) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt.user}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    return messages


def _is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _error_code(reply: Any) -> Any:
    error = reply.get("error") if isinstance(reply, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _excerpt(response: requests.Response, key: str | None) -> str:
    text = " ".join(response.text.split())
    return repr(_redacted(text, key)[:_SHOWN])


def _redacted(text: str, key: str | None) -> str:
    """Some endpoints repeat the key that they refuse."""
    return text.replace(key, "(key)") if key else text


def _retry_after_s(response: requests.Response) -> float:
    try:
        asked = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return 0.0
    return min(60.0, max(0.0, asked))
