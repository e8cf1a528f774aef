"""python -m paddle_vl_sp COMMAND"""

from paddle_vl_sp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
