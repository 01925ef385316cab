"""`cola-ds completion`: a script of bash, which zsh runs too, that completes the words of the command. It is made from the parser
and the schema, holds all it needs, and starts nothing: a completion takes no time."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator

from cola_ds.commands.parser import make_parser
from cola_ds.config.json_schema import Schema, run_schema
from cola_ds.config.schema import SECTIONS
from cola_ds.data.tasks.catalog import TASKS

_FOLDERS = ("DIR", "FOLDER", "RUN_DIR", "RUN_DIR|SWEEP_DIR", "MODEL|RUN_DIR")
_SCRIPT = """\
# What completes the words of cola-ds, as `cola-ds completion {shell}` printed it: words, files, keys and their values.
_cola_ds_options() {{ case $1 in
{options}
esac; }}
_cola_ds_after() {{ case $1 in
{after}
esac; }}
_cola_ds_first() {{ case $1 in
{first}
esac; }}
# What a command that overrides keys takes of them.
_cola_ds_taken() {{ case $1 in
{taken}
esac; }}
_cola_ds_keys="{keys}"
_cola_ds_values() {{ case $1 in
{values}
esac; }}

_cola_ds_offer() {{
  case $1 in
    @folder | @file | @yaml) local IFS=$'\n' ;;  # a name may have spaces
  esac
  case $1 in
    @folder) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "$2")) ;;
    @file) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$2")) ;;
    @yaml) compopt -o filenames 2>/dev/null
      COMPREPLY=($(compgen -d -- "$2") $(compgen -f -X '!*.y?(a)ml' -- "$2")) ;;
    @key) COMPREPLY=($(compgen -W "$_cola_ds_keys" -- "$2")) ;;
    *) COMPREPLY=($(compgen -W "$1" -- "$2"))
      [ -z "${{ZSH_VERSION-}}" ] || COMPREPLY=("${{COMPREPLY[@]/%/ }}") ;;  # what goes on, keys and folders, has no space
  esac
}}

_cola_ds() {{
  [ -z "${{ZSH_VERSION-}}" ] || setopt localoptions shwordsplit ksharrays
  local line="${{COMP_LINE:0:$COMP_POINT}}" word before command after first taken
  word="${{line##*[[:space:]]}}"
  before=(${{line%"$word"}})
  COMPREPLY=()
  if [ "${{#before[@]}}" -lt 2 ]; then
    _cola_ds_offer "{commands} --help --version" "$word"
    return
  fi
  command="${{before[1]}}"
  after="$(_cola_ds_after "$command ${{before[${{#before[@]}}-1]}}")"
  if [ -n "$after" ]; then
    [ "$after" = @none ] || _cola_ds_offer "$after" "$word"
  elif [ "${{word#-}}" != "$word" ]; then
    _cola_ds_offer "$(_cola_ds_options "$command")" "$word"
  elif [ "${{word#*=}}" != "$word" ]; then
    first="$(_cola_ds_values "${{word%%=*}}")"
    if [ -z "${{ZSH_VERSION-}}" ]; then
      _cola_ds_offer "${{first:-@file}}" "${{word#*=}}"
      return
    fi  # bash takes a word apart at =, zsh does not: its files would be sought by the whole word
    if [ -n "$first" ]; then
      _cola_ds_offer "$first" "${{word#*=}}"
    else
      eval 'setopt localoptions bareglobqual; COMPREPLY=(${{~${{word#*=}}}}*(NM))'
    fi
    COMPREPLY=("${{COMPREPLY[@]/#/${{word%%=*}}=}}")
  else
    first="$(_cola_ds_first "$command")"
    taken="$(_cola_ds_taken "$command")"
    if [ -n "$taken" ] && [ "${{#before[@]}}" -gt 2 ]; then
      [ "$taken" != @key ] || taken="$_cola_ds_keys"
      compopt -o nospace 2>/dev/null
      COMPREPLY=($(compgen -S = -W "$taken" -- "$word"))
      return
    fi
    [ -z "$first" ] || _cola_ds_offer "$first" "$word"
  fi
}}
{register}
"""
_REGISTER = {
    "bash": "shopt -s extglob\ncomplete -F _cola_ds cola-ds",
    "zsh": "autoload -Uz compinit bashcompinit && compinit && bashcompinit\ncomplete -o nospace -F _cola_ds cola-ds",
}


def script(shell: str, papers: Iterable[str]) -> str:
    """The script, for bash or zsh. `papers`: what --paper of a report may be."""
    (subcommands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers: dict[str, argparse.ArgumentParser] = subcommands.choices
    options, after, first, taken = [], [], [], []
    for name, parser in parsers.items():
        options.append((name, " ".join(word for action in parser._actions for word in action.option_strings)))
        positional = [action for action in parser._actions if not action.option_strings]
        first += [(name, _offered(action)) for action in positional[:1]]
        if any(action.dest == "overrides" for action in positional):
            taken.append((name, "model.path model.revision" if name == "export" else "@key"))
        for action in parser._actions:
            offered = " ".join(papers) if "--paper" in action.option_strings else _offered(action)
            after += [(f"{name} {word}", offered) for word in action.option_strings if action.nargs != 0]
    values = dict(_values(run_schema()))
    return _SCRIPT.format(
        shell=shell, commands=" ".join(parsers), options=_cases(options), after=_cases(after), first=_cases(first),
        taken=_cases(taken), keys=" ".join(values),
        values=_cases((key, said) for key, said in values.items() if said), register=_REGISTER[shell],
    )  # fmt: skip


def _cases(pairs: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    return "\n".join(f"  {shlex.quote(name)}) echo {shlex.quote(said)} ;;" for name, said in pairs)


def _offered(action: argparse.Action) -> str:
    """What may stand for an argument: words, or @ and a kind of them."""
    metavar = str(action.metavar or "")
    if action.choices:
        return " ".join(map(str, action.choices))
    if "--task" in action.option_strings:
        return " ".join(TASKS)
    if metavar.endswith(".yaml"):
        return "@yaml"
    if metavar in _FOLDERS:
        return "@folder"
    if metavar.startswith(("FILE", "auto|never")):
        return "auto never" if metavar.startswith("auto") else "@file"
    return {"KEY": "@key"}.get(metavar, "@none")


def _values(schema: Schema) -> Iterator[tuple[str, str]]:
    """By section.key, the words that it may be; none where it is a number or any text."""
    for name, said in schema["properties"].items():
        inner = schema["$defs"][said["$ref"].rpartition("/")[2]]["properties"] if name in SECTIONS else {"": said}
        for key, value in inner.items():
            words = _words(value)
            yield f"{name}.{key}".rstrip("."), "" if words == ["null"] else " ".join(words)


def _words(value: Schema) -> list[str]:
    if value.get("type") == "boolean":
        return ["true", "false"]
    if value.get("type") == "null":
        return ["null"]
    if "const" in value or "enum" in value:
        return [str(each) for each in value.get("enum", [value.get("const")])]
    return [word for each in value.get("anyOf", ()) for word in _words(each)]
