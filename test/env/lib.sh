# shellcheck shell=bash
# What podman-env and host share: messages, locks, and making a Debian root.
# Sourced, never run. The caller sets `cache` (a folder it may fill).
: "${cache:?}"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
	say "$@"
	exit 1
}

# make_cache creates the cache folder. It ignores itself, so that it never
# shows in `git status` whatever the checkout's own .gitignore says.
make_cache() {
	mkdir -p "$cache"
	[[ -e $cache/.gitignore ]] || echo '*' >"$cache/.gitignore"
}

# lock NAME waits for the one lock of that name and holds it until this shell
# ends. Whatever outlives the shell must be started with 8>&-, or it would keep
# the lock for as long as it lives.
lock() {
	exec 8>"$cache/$1.lock"
	flock 8
}

# need_commands COMMAND=PACKAGE... installs the packages of missing commands
# where apt is at hand, and else says what is missing.
need_commands() {
	local pair missing=() debs=()
	for pair in "$@"; do
		command -v "${pair%%=*}" >/dev/null && continue
		missing+=("${pair%%=*}")
		debs+=("${pair#*=}")
	done
	((${#missing[@]})) || return 0
	if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
		die "missing: ${missing[*]}; as root: apt-get install ${debs[*]}"
	fi
	say "installing ${debs[*]}"
	local log=$cache/apt.log
	export DEBIAN_FRONTEND=noninteractive
	# The lists may be absent or too old to name what the mirror serves now.
	apt-get install -y --no-install-recommends "${debs[@]}" >"$log" 2>&1 ||
		{ apt-get update && apt-get install -y --no-install-recommends "${debs[@]}"; } >"$log" 2>&1 ||
		die "apt-get install ${debs[*]}: see $log"
}

# is_debian_root DIR SUITE OPTION... tells whether debian_root made the root at
# DIR from these very arguments.
is_debian_root() { [[ -d $1 && -r $1.stamp && $(<"$1.stamp") == "$*" ]]; }

# debian_root DIR SUITE OPTION... makes a Debian root at DIR, with options for
# mmdebstrap, unless one made from these arguments is there. It is built under
# another name and renamed when whole, so that an interrupted build is never
# taken for a root. DIR.stamp says what the root was made from.
debian_root() {
	is_debian_root "$@" && return 0
	local dir=$1 suite=$2 from=$*
	shift 2
	need_commands mmdebstrap=mmdebstrap
	say "making a Debian $suite root (a minute or so, once)"
	# Should anything of the host be mounted in there after all, it stays.
	rm -rf --one-file-system "$dir" "$dir.stamp" "$dir.building"
	# mmdebstrap takes its own default mirror; a host that has another one sets
	# DEBIAN_MIRROR.
	mmdebstrap --variant=apt \
		--aptopt='Apt::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		"$@" "$suite" "$dir.building" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} \
		8>&- >"$dir.log" 2>&1 || die "mmdebstrap: see $dir.log"
	mv "$dir.building" "$dir"
	printf '%s\n' "$from" >"$dir.stamp"
}

# identity PID prints what tells this process from any later one of that pid:
# its start time, in ticks since boot, and the boot's id. It prints nothing
# when there is no such process. No lock or pid file can go stale this way.
identity() {
	local stat boot
	{ read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
	read -r boot </proc/sys/kernel/random/boot_id
	# Fields are counted from behind the command name, which may hold blanks.
	# shellcheck disable=SC2086 # it is to be split
	set -- "$1" ${stat##*) }
	# $2 is the state: a zombie is not alive.
	[[ $2 == Z ]] || printf '%s %s %s\n' "$1" "${21}" "$boot"
}
