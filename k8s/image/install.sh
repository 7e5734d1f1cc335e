#!/bin/sh
# The steps of k8s/image/Dockerfile, so that they can be run without Docker:
#
#   install.sh packages VENV VARIANT    a virtual environment with the packages that pyproject.toml asks for (cuda or cpu)
#   install.sh project VENV             Viewpoint itself into it
#   install.sh requirements             prints those packages
#
# To be started in a folder that holds pyproject.toml and constraints.txt, and for `project` the code.
set -eu

requirements() {
	python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")'
}

pip_install() {
	"$venv/bin/python" -m pip install --disable-pip-version-check --no-cache-dir "$@"
}

step=$1
venv=${2:-}
variant=${3:-cuda}
case $step in
requirements)
	requirements
	;;
packages)
	python3 -m venv "$venv"
	if [ "$variant" = cpu ]; then
		# both from one place: a torchvision of another build does not load
		pip_install --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch torchvision
	fi
	requirements >requirements.txt
	pip_install -c constraints.txt -r requirements.txt
	;;
project)
	pip_install --no-deps .
	;;
*)
	echo "install.sh: there is no step '$step'; there are requirements, packages and project" >&2
	exit 2
	;;
esac
