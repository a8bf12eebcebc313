"""``python -m fsvfm`` or ``fsvfm``: what there is to run."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "prepare": "raw photographs to face crops, parsing maps and a manifest",
    "train": "pre-train or fine-tune: experiment=<name>",
    "evaluate": "scores, metrics with intervals and tables of detectors on test sets",
    "predict": "score photographs, videos and folders with a detector",
    "serve": "a web page and an HTTP endpoint in front of a detector",
    "report": "one HTML page about runs and their evaluation",
    "export": "convert checkpoints; `export list` shows the released ones",
}


#: Completion of the console script in bash, and in zsh after `autoload -U bashcompinit && bashcompinit`. The word after
#: `fsvfm` is ours; Hydra knows groups, options and keys. `=` must not separate words: it completes `group=opt…`.
COMPLETION = """_fsvfm() {
  local current="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" choices
  if [ "$COMP_CWORD" -le 1 ]; then
    choices="COMMANDS"
  else
    choices=$(COMP_LINE="fsvfm${COMP_LINE#* $command}" fsvfm "$command" -sc query=bash 2>/dev/null)
  fi
  COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$current"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _fsvfm fsvfm"""


def main() -> None:
    """Run a command by name, list them, or print shell completion."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked in COMMANDS:
        sys.argv.pop(1)
        runpy.run_module(f"fsvfm.{asked}", run_name="__main__", alter_sys=True)
    elif asked == "completion":
        print(COMPLETION.replace("COMMANDS", " ".join(COMMANDS)))
    elif asked in ("-h", "--help"):
        print("usage: fsvfm <command> [key=value …]   (the same as python -m fsvfm.<command>)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10}{purpose}")
        print('\nAny command explains itself with --help. Completion in the shell: eval "$(fsvfm completion)"')
    else:
        from fsvfm.suggest import nearest

        print(
            f"error: there is no command {asked!r}{nearest(asked, COMMANDS)} ({', '.join(COMMANDS)})", file=sys.stderr
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
