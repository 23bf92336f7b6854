#!/usr/bin/env bash
# Makes a release of the commit that is checked out: one stripped binary with its kernels for every architecture, the
# licences of what is in it, the README, and their checksums. The same commit, toolchain and host give the same archive.
#
#   scripts/release.sh [--arch LIST] [--out DIR] [--glibc VERSION] [--allow-dirty]
#   scripts/release.sh --glibc-of FILE
#
#   --arch LIST      kernels for these architectures alone, as in sm_90a or sm_80,sm_90a (all eight)
#   --out DIR        where the archive goes (dist)
#   --glibc VERSION  for hosts with this glibc or newer, by cargo-zigbuild, which must be installed (the build host's)
#   --allow-dirty    also what is not committed; the archive's name says so
#   --glibc-of FILE  only print which glibc a binary needs
#
# Needs cargo, git, python3, GNU tar and binutils. NVRTC compiles the kernels; where no Python package brings it, a
# virtual environment is made in target/ci-python from scripts/requirements.txt.
set -euo pipefail
# A failure within $(…) ends the script, too.
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

# The oldest glibc that a release should ask for (Debian 10, RHEL 8, Ubuntu 18.10), and the most that it may weigh.
wanted_glibc=2.28
most_mib=30

fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

step() { printf '== %s\n' "$1" >&2; }

# The newest symbol version of glibc that a binary asks for.
glibc_of() {
    local version
    version=$(objdump -T "$1" | grep -oE '\(GLIBC_[0-9.]+\)' | tr -d '()' | sort -uV | tail -n 1) || version=""
    [ -n "$version" ] || fail "$1 asks for no glibc"
    printf '%s\n' "${version#GLIBC_}"
}

# Whether version $1 is newer than $2.
is_newer() { [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | tail -n 1)" = "$1" ]; }

in_scripts() { PYTHONPATH=scripts PYTHONDONTWRITEBYTECODE=1 "$@"; }

has_nvrtc() { in_scripts "$1" -c 'import nvrtc; nvrtc.find()' 2> /dev/null; }

# A Python whose packages have NVRTC.
python_with_nvrtc() {
    local own=target/ci-python/bin/python
    if [ -x "$own" ] && has_nvrtc "$own"; then echo "$own"; return; fi
    if has_nvrtc python3; then echo python3; return; fi
    step "a virtual environment with NVRTC"
    python3 -m venv target/ci-python
    "$own" -m pip install --quiet --disable-pip-version-check --requirement scripts/requirements.txt >&2
    has_nvrtc "$own" || fail "NVRTC was not found after pip install -r scripts/requirements.txt"
    echo "$own"
}

# Builds the binary for the host, or for a given glibc, and prints its path.
build() {
    local folder=${CARGO_TARGET_DIR:-target}
    if [ -n "$glibc" ]; then
        cargo zigbuild --release --locked --target "$target.$glibc" >&2
        echo "$folder/$target/release/tokmeter"
    else
        cargo build --release --locked >&2
        echo "$folder/release/tokmeter"
    fi
}

check_kernels() {
    local said
    said=$("$1" doctor | grep 'kernels in this binary') || fail "$1 doctor does not list the kernels in the binary"
    [[ $said == *"compiled for ${architectures//,/, }" ]] ||
        fail "the binary should carry kernels for ${architectures//,/, }, and says: $said"
}

check_size() {
    local mib=$(($(stat -c %s "$1") >> 20))
    [ "$mib" -lt "$most_mib" ] || fail "$1 weighs $mib MiB, expected less than $most_mib"
}

check_glibc() {
    local needed
    needed=$(glibc_of "$1")
    echo "needs glibc $needed or newer"
    if [ -n "$glibc" ]; then
        ! is_newer "$needed" "$glibc" || fail "the binary needs glibc $needed, expected at most $glibc"
    elif is_newer "$needed" "$wanted_glibc"; then
        echo "for hosts with glibc $wanted_glibc (Debian 10, RHEL 8): build in a container of AlmaLinux 8 or Debian 10," \
            "or with cargo-zigbuild installed and --glibc $wanted_glibc"
    fi
}

all=$(in_scripts python3 -c 'import nvrtc; print(",".join(nvrtc.ARCHITECTURES))') || fail "python3 is needed"
architectures=$all out=dist glibc="" is_dirty_allowed=false
while [ $# -gt 0 ]; do
    case $1 in
        --arch | --out | --glibc | --glibc-of) [ $# -ge 2 ] || fail "$1 needs a value" ;;&
        --arch) architectures=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --glibc) glibc=$2; shift 2 ;;
        --glibc-of) glibc_of "$2"; exit ;;
        --allow-dirty) is_dirty_allowed=true; shift ;;
        *) fail "unknown argument $1" "the head of scripts/release.sh lists them" ;;
    esac
done

for program in cargo git objdump python3 sha256sum strip tar; do
    command -v "$program" > /dev/null || fail "$program is needed and was not found"
done
[ -z "$glibc" ] || command -v cargo-zigbuild > /dev/null ||
    fail "--glibc needs cargo-zigbuild, which is not installed" "cargo install cargo-zigbuild, and pip install ziglang"
known=$(in_scripts python3 -c 'import nvrtc, sys; print(",".join(nvrtc.architectures(sys.argv[1])))' "$architectures" \
    2> /dev/null) || fail "unknown architecture in $architectures" "there are $all"
architectures=$known
commit=$(git rev-parse --verify --quiet HEAD) || fail "a release is made from a git checkout, and this is none"
seconds=$(git log -1 --format=%ct)
changed=$(git status --porcelain)
[ -z "$changed" ] || $is_dirty_allowed ||
    fail "the tree differs from the commit, first:${changed%%$'\n'*}" "commit it, or --allow-dirty"
target=$(rustc -vV | sed -n 's/^host: //p')

step "kernels for $architectures"
python=$(python_with_nvrtc)
"$python" scripts/prebuild_kernels.py --arch "$architectures" >&2

step "binary"
built=$(build)
version=$("$built" --version)
name=tokmeter-$(sed -n 's/^tokmeter //p' <<< "$version")-$target
[ "$architectures" = "$all" ] || name+=-${architectures//,/-}
built_from=$(sed -n 's/^commit: //p' <<< "$version")
case $built_from in
    "$commit") ;;
    "$commit-dirty") $is_dirty_allowed || fail "the binary was built from a tree that differs from the commit" ;;
    *) fail "the binary was built from commit $built_from, expected $commit" ;;
esac
[ -z "$changed" ] || name+=-dirty

step "archive"
folder=$out/$name
rm -rf "$folder"
mkdir -p "$folder"
strip --strip-all -o "$folder/tokmeter" "$built"
check_kernels "$folder/tokmeter"
check_size "$folder/tokmeter"
scripts/third_party_licences.py --target "$target" --out "$folder/THIRD-PARTY-LICENCES.txt"
cp README.md LICENSE-APACHE LICENSE-MIT "$folder/"
tar --create --format=ustar --sort=name --owner=0 --group=0 --numeric-owner --mode='u=rwX,go=rX' --mtime="@$seconds" \
    --directory="$out" "$name" | gzip --no-name --best > "$folder.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" "$name/tokmeter" > SHA256SUMS)

"$folder/tokmeter" --version
check_glibc "$folder/tokmeter"
echo "$(stat -c %s "$folder/tokmeter") bytes stripped, $(stat -c %s "$folder.tar.gz") packed: $folder.tar.gz"
