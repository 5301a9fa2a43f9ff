"""Every error the library raises on purpose; a message says what was got, what was expected and what to do.

    AttnpredError
    ├── ConfigError        a setting is wrong, or two settings do not fit together (also a ValueError)
    ├── ShapeError         a tensor has another shape than its name promises (also a ValueError)
    ├── PredictorError     a predictor file is missing, damaged or made for something else
    ├── TraceError         a folder of attention traces is missing, damaged or made for something else
    ├── UnsupportedModelError   the model cannot be served; raised before the first token
    ├── FetchError         a named model could not be fetched, or is not the one that was pinned
    ├── NotSparseError     `strict=True` and a step that should have been sparse was not
    ├── StoreError         keys and values could not be written, read back or trusted; names the file
    │   └── TierFullError  a tier has no room left for them
    ├── OutputError        a file cannot be written where it was wanted
    ├── CacheFileError     a saved cache is missing, damaged or made for something else
    └── MissingExtraError  an optional package is not installed

Messages are one line each.
"""


class AttnpredError(Exception):
    """Base of all errors below; `except attnpred.AttnpredError` catches what a user can cause."""


class ConfigError(AttnpredError, ValueError):
    """A setting is wrong, or two settings do not fit together."""


class ShapeError(AttnpredError, ValueError):
    """A tensor has another shape than its name promises."""


class PredictorError(AttnpredError):
    """A predictor file is missing, damaged or made for something else."""


class TraceError(AttnpredError):
    """A folder of attention traces is missing, damaged or made for something else."""


class UnsupportedModelError(AttnpredError):
    """The model cannot be served."""


class FetchError(AttnpredError):
    """A named model could not be fetched, or is not the one that was pinned."""


class NotSparseError(AttnpredError):
    """`strict=True` and a step that should have been sparse was not."""


class StoreError(AttnpredError):
    """Keys and values could not be written, read back or trusted."""


class TierFullError(StoreError):
    """A tier has no room left."""


class CacheFileError(AttnpredError):
    """A saved cache is missing, damaged or made for something else."""


class OutputError(AttnpredError):
    """A file cannot be written where it was wanted."""


class MissingExtraError(AttnpredError, ImportError):
    """An optional package is not installed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Return the error for a missing optional `package` that the extra `extra` brings."""
    return MissingExtraError(f"got no module {package!r}, expected it installed: pip install 'attnpred[{extra}]'")


def closed_cache() -> StoreError:
    """Return the error for any use of a cache after `close`, or while another thread closes it."""
    return StoreError("got a cache that was closed, expected an open one: its context is gone, make a new cache")


def forked_cache(made: int, here: int) -> StoreError:
    """Return the error for a cache with a slow tier of process `made` that is used in its fork `here`."""
    return StoreError(
        f"got a cache of process {made} in process {here}, which was forked from it, expected one made in this process: a "
        f"cache with a slow tier does not cross a fork, for its threads stay behind and its file has one owner; make it "
        f"after the fork, or save it and load it there"
    )
