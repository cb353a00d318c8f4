exec /husk/husk-bench "$@"
