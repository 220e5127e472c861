#!/usr/bin/env bash
# templates.sh makes the ext4 file systems that format.go writes on blank disks:
# ext4-*.gz, the blocks of an empty file system that are not zero, each preceded
# by its number (8 bytes, little endian). What they are is checked by the tests.
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}"
PATH=$PATH:/usr/sbin

# Named one by one, so that no configuration of this machine's has a say.
# metadata_csum_seed lets each copy get a UUID of its own.
features=none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super
features+=,large_file,huge_file,dir_nlink,extra_isize,metadata_csum,metadata_csum_seed
id=3c5a9d3e-7a5b-4c0e-9f0a-5d2f1b8c6e41

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export E2FSPROGS_FAKE_TIME=1 MKE2FS_CONFIG=/dev/null

# make NAME MIB JOURNAL-MIB
make() {
	mke2fs -q -F -t ext4 -O "$features" -b 4096 -I 256 -m 0 -J "size=$3" -U "$id" \
		-E "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,hash_seed=$id" "$tmp/$1" "$2M" >/dev/null 2>&1
	python3 - "$tmp/$1" >"$tmp/blocks" <<'END'
import sys

number = 0
with open(sys.argv[1], "rb") as image:
    while block := image.read(4096):
        if any(block):
            sys.stdout.buffer.write(number.to_bytes(8, "little") + block)
        number += 1
END
	gzip -9n <"$tmp/blocks" >"ext4-$1.gz"
}
make small 48 4
make large 256 32
