//! Templates: several vCPUs, many pods at once, namespaces, and builders and templates that come to harm.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

use husk_e2e::cri::{Pod, Pods, pods};
use husk_e2e::node::{self, Config};
use husk_e2e::template::{STORE, Templates, builders, end_delays, is_clone, steps};
use nix::sys::signal::{Signal, kill};
use serde_json::json;

/// How long a process that makes a template may take until it has begun.
const BEGIN: Duration = Duration::from_secs(60);
/// Number of pods that start at once.
const PODS: usize = 20;

#[test]
fn guest_with_two_vcpus_is_made_from_a_template() {
    pods("template-vcpus", |pods| {
        let _templates = Templates::on();
        let mut config = pods.config();
        config["linux"]["resources"] = json!({ "cpu_quota": 200_000, "cpu_period": 100_000 });
        Templates::make_for(pods, config.clone());
        let pod = pods.run(config);
        assert!(is_clone(&pod), "{:?}\n{}", steps(&pod), node::log_tail(30));
        let container = pod.start(&pod.sh("sleep 100000"));
        // Each vCPU runs programs, and its timer interrupts sleeping ones.
        for cpu in 0..2 {
            let script =
                format!("for i in 1 2 3 4 5; do taskset {:x} sleep 0.01 || exit 1; done; echo slept", 1 << cpu);
            assert_eq!(container.sh(&script), "slept", "vCPU {cpu}");
        }
        // The vCPUs agree on the time: a program that changes between them never sees it go back.
        let clock = "last=0; for i in 1 2 3 4 5 6 7 8 9 10; do \
                     now=$(taskset $((1 + i % 2)) cut -d' ' -f1 /proc/uptime | tr -d .); \
                     [ $now -ge $last ] || echo back; last=$now; done; echo end";
        assert_eq!(container.sh(clock), "end");
    });
}

#[test]
fn killed_builder_leaves_nothing_that_is_used() {
    pods("template-killed", |pods| {
        let _templates = Templates::on();
        let pod = pods.pod();
        let partial = || {
            let entries = fs::read_dir(STORE).into_iter().flatten().flatten();
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("partial-")).count()
        };
        node::eventually(BEGIN, || (partial() > 0).then_some(())).expect("no template was begun");
        let killed = builders();
        assert_eq!(killed.len(), 1);
        killed.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap());
        node::eventually(BEGIN, || builders().is_empty().then_some(())).expect("the builder did not end");
        assert!(Templates::complete().is_empty());
        // The pod that has started the builder is not affected.
        assert_eq!(pod.start(&pod.sh("sleep 100000")).sh("echo here"), "here");
        pod.remove();
        // The next pod starts another builder, which removes what the killed one has left.
        Templates::make(pods);
        assert_eq!(partial(), 0);
        assert!(is_clone(&pods.pod()));
    });
}

/// Starts [`PODS`] pods at once.
fn start_at_once(pods: &Pods) -> Vec<Pod> {
    thread::scope(|scope| {
        let starts: Vec<_> = (0..PODS).map(|_| scope.spawn(|| pods.pod())).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    })
}

#[test]
fn pods_that_start_at_once_without_a_template_start_one_builder() {
    pods("template-many", |pods| {
        let _templates = Templates::on();
        let started = start_at_once(pods);
        assert!(builders().len() <= 1, "{:?}", builders());
        for pod in &started {
            assert!(pod.is_ready());
        }
        started.iter().for_each(Pod::remove);
        let made = || (builders().is_empty() && Templates::complete().len() == 1).then_some(());
        if node::eventually(Duration::from_secs(300), made).is_none() {
            panic!("no template was made: {}", fs::read_to_string(Path::new(STORE).join("log")).unwrap_or_default());
        }
        for pod in &start_at_once(pods) {
            assert!(is_clone(pod), "{:?}", steps(pod));
        }
    });
}

#[test]
fn namespaces_do_not_share_a_template_if_the_configuration_says_so() {
    pods("template-namespaces", |pods| {
        let _templates = Templates::on();
        let _config = Config::set("template = \"auto\"\ntemplate_share = \"namespace\"\n");
        let config = |namespace: &str| {
            let mut config = pods.config();
            config["metadata"]["namespace"] = namespace.into();
            config
        };
        Templates::make_for(pods, config("one"));
        assert!(is_clone(&pods.run(config("one"))));
        assert!(!is_clone(&pods.run(config("other"))));
    });
}

#[test]
fn template_whose_memory_was_replaced_or_cut_is_not_used() {
    pods("template-memory", |pods| {
        let _templates = Templates::on();
        for harm in ["replaced", "cut"] {
            let memory = Templates::make(pods).join("memory");
            if harm == "replaced" {
                let copy = memory.with_file_name("copy");
                fs::copy(&memory, &copy).unwrap();
                fs::rename(&copy, &memory).unwrap();
            } else {
                let file = File::options().write(true).open(&memory).unwrap();
                file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
            }
            let pod = pods.pod();
            assert!(!is_clone(&pod), "{harm}");
            let log = node::log_tail(60);
            assert!(log.contains("does not belong to its state"), "{harm}: {log}");
            pod.remove();
            assert_eq!(end_delays(), 1, "{harm}");
        }
    });
}
