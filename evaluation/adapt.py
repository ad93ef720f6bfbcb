"""The former name of evaluation/probe.py; kept for one release."""

from evaluation.probe import main

if __name__ == "__main__":
    main()
