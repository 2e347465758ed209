#!/usr/bin/env bash
# Make a Debian 12 or Ubuntu 24.04 machine ready for the testbed: kernel modules now and at every boot, a virtual environment
# outside of the project, ./dev setup. Idempotent; `vagrant up` runs it, and so can you, as root, on a machine of your own.
#
#   tools/provision.sh [--print | --root FOLDER] [PROJECT]
#
# PROJECT  the project's folder; default: the one that this script is in
# --print  only say what would be done, in words that a shell takes
# --root   write the files below FOLDER, and run nothing
set -euo pipefail

VENV=/opt/testbed/venv
# ip_vs and its schedulers, those that Debian's kernel has (twos is not built); delay and loss on links; dummy links
MODULES="ip_vs ip_vs_rr ip_vs_wrr ip_vs_lc ip_vs_wlc ip_vs_lblc ip_vs_lblcr ip_vs_dh ip_vs_sh ip_vs_sed ip_vs_nq ip_vs_fo
  ip_vs_ovf ip_vs_mh nf_conntrack sch_netem dummy"

mode=run
root=
project=

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0"
}

die() {
  echo "provision: $*" >&2
  exit 2
}

say() { printf 'provision: %s\n' "$*" >&2; }

# run COMMAND...: carry it out, or only print it.
run() {
  if [ "$mode" = run ]; then
    say "$(printf '%q ' "$@")"
    "$@"
  else
    printf '%q ' "$@"
    echo
  fi
}

# write FILE: the text on standard input, unless the file has it already.
write() {
  local file=$1 text
  text=$(cat)
  if [ "$mode" = print ]; then
    printf 'mkdir -p %q\ncat >%q <<EOF\n%s\nEOF\n' "$(dirname "$file")" "$file" "$text"
    return
  fi
  if [ -f "$root$file" ] && [ "$text" = "$(cat "$root$file")" ]; then return; fi
  say "writes $root$file"
  mkdir -p "$(dirname "$root$file")"
  printf '%s\n' "$text" >"$root$file"
}

# Whether this system is booted, by sd_booted(3): the kernel that runs over a chroot, or over an image that is built, is another's.
is_booted() {
  [ -d /run/systemd/system ]
}

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --print) mode=print ;;
      --root)
        [ $# -ge 2 ] || die "--root needs a folder"
        mode=files root=${2%/}
        [ -d "$root" ] || die "--root: there is no folder '$2'"
        shift
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      -*) die "there is no option '$1'; see --help" ;;
      *)
        [ -z "$project" ] || die "one project, not both '$project' and '$1'"
        project=$1
        ;;
    esac
    shift
  done
  if [ -z "$project" ]; then project=$(dirname "$(dirname "$(readlink -f "$0")")"); fi
  case "$project" in
    /*) ;;
    *) die "the project's folder is given from / on, not '$project'" ;;
  esac
}

check_machine() {
  if [ "$mode" != run ]; then return; fi
  [ "$(id -u)" = 0 ] || die "needs root: run it with sudo"
  command -v apt-get >/dev/null || die "needs apt: this is for Debian 12 and Ubuntu 24.04"
  [ -x "$project/dev" ] || die "there is no $project/dev: is the project's folder mounted there?"
}

# The project may be a folder that host and VM share, or a copy that the host renews: each keeps its virtual environment to
# itself. ./dev reads where it is from this file.
place_venv() {
  echo "$VENV" | write /etc/testbed/venv
}

# Pods run as other users, too, and import what is in the project; Debian gives home folders the mode 700.
open_way_to_project() {
  local folder
  folder=$(dirname "$project")
  while [ "$folder" != / ]; do
    run chmod a+x "$folder"
    folder=$(dirname "$folder")
  done
}

load_modules() {
  local module text="# What the testbed needs of the kernel; written by tools/provision.sh"
  for module in $MODULES; do text+=$'\n'$module; done
  echo "$text" | write /etc/modules-load.d/testbed.conf
  printf '%s\n' "# no dummy0 that nobody asked for" "options dummy numdummies=0" | write /etc/modprobe.d/testbed.conf
  if [ "$mode" = run ] && ! is_booted; then
    say "this system is not booted (by systemd): the modules come when it is"
    return
  fi
  local words
  read -r -d '' -a words <<<"$MODULES" || true
  if ! run modprobe -a "${words[@]}"; then
    die "the kernel $(uname -r) lacks modules (see above). A kernel for clouds may come without: apt-get install" \
      "linux-image-$(dpkg --print-architecture) (Ubuntu: linux-modules-extra-$(uname -r)), restart, provision again"
  fi
}

set_up() {
  run "$project/dev" setup
}

parse "$@"
check_machine
place_venv
load_modules
open_way_to_project
set_up
[ "$mode" != run ] || say "ready: cd $project && sudo ./dev demo"
