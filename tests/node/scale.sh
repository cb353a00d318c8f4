exec /husk/husk-scale "$@"
