exec /husk/husk-chaos "$@"
