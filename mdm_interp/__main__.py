"""`mdm-interp`, and `python -m mdm_interp`. All that takes time is imported where Ctrl-C already ends in one line."""

import sys


def main() -> None:
    """Run the console script."""
    try:
        from mdm_interp.cli import main as run

        run()
    except KeyboardInterrupt:
        from mdm_interp.errors import INTERRUPTED

        print(f"mdm-interp: {INTERRUPTED}", file=sys.stderr)
        sys.exit(130)
    finally:
        # Python dies of a Ctrl-C that came inside `exec`, with which dataclasses are made, though it was handled: until
        # the next one.
        exec("")


if __name__ == "__main__":
    main()
