"""What the hub's client says when it cannot give something, for people."""

from __future__ import annotations


def why_not_fetched(error: BaseException, wanted: str) -> str:
    """Why the hub gave nothing, in words; libraries hide the reason in the chain of causes.

    Args:
        error: What the library raised.
        wanted: What the repository should have been, with its article.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        reason = "it is not in the hub's cache, and HF_HUB_OFFLINE is set"
    elif "GatedRepoError" in kinds:
        reason = "its owner asks you to accept terms on the hub first, then log in"
    elif "RepositoryNotFoundError" in kinds:
        reason = "the hub has no such public model"
    elif "RemoteEntryNotFoundError" in kinds:
        reason = f"that repository on the hub is not {wanted}"
    elif kinds & {"ConnectError", "ConnectionError", "TimeoutException", "Timeout"}:
        reason = "it is not in the hub's cache, and the hub cannot be reached"
    elif "LocalEntryNotFoundError" in kinds:
        reason = "it is not in the hub's cache, and local_files_only forbids to download it"
    else:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
    return f"there is no such file or folder here, and as a hub id it cannot be had: {reason}."
