"""Checks that the published weights of a timm model are cached or can be downloaded, before timm tries to load them.

Unusual: without a network huggingface_hub tries two files six times each, which takes a minute and prints twenty lines
before the error. Here a single request is sent first, and only if nothing is cached. It takes the same way as the
download: through the hub's client or through urllib, so that proxies, mirrors and offline mode hold for it too.
"""

from __future__ import annotations

from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import timm
import torch

from ._messages import one_line

_PATIENCE = 10.0  # seconds for a host to answer


def require_published(name: str) -> None:
    """Raise a `ConnectionError` if the weights of this timm name are not cached and their host does not answer.

    Nothing is said of weights that the host does not have: timm's error names those.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or cfg.file or cfg.state_dict:
        return
    if cfg.hf_hub_id:
        _require_hub(str(cfg.hf_hub_id), str(cfg.hf_hub_filename or "model.safetensors"))
    elif cfg.url:
        _require_url(str(cfg.url))


def _require_hub(place: str, filename: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = place.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        if any(file.suffix not in (".json", ".md") for file in folder.iterdir() if file.is_file()):
            return
    except LocalEntryNotFoundError:
        pass
    url = hf_hub_url(repository, filename, revision=revision or None)
    try:
        get_hf_file_metadata(url, timeout=_PATIENCE)
    except HfHubHTTPError:
        return  # an answer
    except Exception as error:  # of requests, httpx or httpx2, depending on the version of huggingface_hub
        raise _unreachable(url, error) from error


def _require_url(url: str) -> None:
    if (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file():
        return
    try:
        urlopen(Request(url, method="HEAD"), timeout=_PATIENCE).close()
    except HTTPError:
        return  # an answer, if only that it does not like HEAD
    except OSError as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> ConnectionError:
    return ConnectionError(f"{urlparse(url).hostname}: {one_line(error)}")
