"""The command: ``python tests/fuzz/fuzz.py --help``. Worker processes import this file again and must find it empty."""

if __name__ == "__main__":
    import sys

    import campaign

    sys.exit(campaign.main())
