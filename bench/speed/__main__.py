"""`python -m bench.speed`."""

from bench.speed.program import main

if __name__ == "__main__":
    main()
