import sys


def main() -> int:
    # Answered before anything is imported: packagers and supervisors call it often.
    if sys.argv[1:] in (["--version"], ["version"]):
        from xim_agent import PROTOCOL, __version__

        sys.stdout.write(f"xerotier-xim-agent {__version__} (XIM protocol {PROTOCOL})\n")
        return 0
    from xim_agent.cli.main import main as cli

    return cli(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
