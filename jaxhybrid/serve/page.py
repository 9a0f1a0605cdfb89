"""The page at `/`: one file, allowed to run its own script and to ask this server, and nothing else."""

import base64
import hashlib
import re
from importlib.resources import files

PAGE = (files("jaxhybrid.serve") / "page.html").read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """The hash by which a browser knows the page's own block of that tag."""
    (block,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = "; ".join((
    "default-src 'none'", "connect-src 'self'", f"script-src {_hash_of('script')}", f"style-src {_hash_of('style')}",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
))  # fmt: skip
