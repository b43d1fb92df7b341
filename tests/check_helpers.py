"""Every annotation is enforced in tests: beartype checks types, jaxtyping the shapes that the arguments and the result
of one call share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

once = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping's own errors are


def install() -> None:
    """Check every function of the package that is imported from now on.

    jaxtyping's decorator checks arguments twice, once more after the call, to tell which one was wrong; that takes half
    of the time of some tests. Functions inside functions are left out: each call of the outer one would compile another
    checker, which beartype keeps (gigabytes after a thousand backward passes).
    """
    original = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
        def decorate(made: Any) -> Any:
            if "<locals>" in made.__qualname__:
                return made
            if inspect.isfunction(made) and not inspect.isgeneratorfunction(made):
                checked = original(once(made), typechecker=None)
                return functools.wraps(made)(
                    lambda *args, **kwargs: (made if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)
                )
            return original(made, typechecker=typechecker)

        return decorate

    jaxtyping.install_import_hook("mdm_interp", "beartype.beartype")
    jaxtyping.jaxtyped = jaxtyped  # pyright: ignore[reportAttributeAccessIssue]: what the hook calls
