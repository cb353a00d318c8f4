//! Templates: guests that are made from a saved guest.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use husk_e2e::cri::{Pod, Pods, pods};
use husk_e2e::node::{self, Config};
use husk_e2e::template::{Templates, end_delays, is_clone, steps};
use serde_json::{Value, json};

#[test]
fn second_pod_is_made_from_the_template_of_the_first() {
    pods("template", |pods| {
        let _templates = Templates::on();
        Templates::make(pods);
        let pod = pods.pod();
        assert!(is_clone(&pod), "{:?}\n{}", steps(&pod), node::log_tail(30));
        let container = pod.start(&pod.sh("sleep 100000"));
        assert_eq!(container.sh("hostname"), pod.config["hostname"].as_str().unwrap());
        // The interface was plugged in after the guest was restored.
        let address = pod.addresses()[0].to_string();
        assert!(container.sh("ip -4 -o address show dev eth0").contains(&address));
        // The guest's clocks go on.
        let uptime = || container.sh("cut -d' ' -f1 /proc/uptime").parse::<f64>().unwrap();
        let (before, _) = (uptime(), container.sh("sleep 1"));
        assert!((before + 1.0..before + 60.0).contains(&uptime()));
        let guest: u64 = container.sh("date +%s").parse().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(guest) <= 5, "the guest's clock shows {guest}, and the node's clock shows {now}");
    });
}

/// What must differ between guests: random bytes of two kinds, those of the hypervisor, `boot_id`, and the MAC address.
const IDENTITY: &str = "mknod /hwrng c 10 183; \
                        for from in /dev/urandom /hwrng; do head -c 16 $from | hexdump -ve '1/1 \"%02x\"'; echo; done; \
                        cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
                        cat /sys/class/net/eth0/address; hostname";

/// Starts a pod that can have privileged containers.
fn privileged(pods: &Pods) -> Pod {
    let mut config = pods.config();
    config["linux"]["security_context"]["privileged"] = true.into();
    pods.run(config)
}

#[test]
fn guests_of_a_template_have_their_own_identities() {
    pods("template-identity", |pods| {
        let _templates = Templates::on();
        Templates::make(pods);
        let mut seen = BTreeSet::new();
        for batch in 0..10 {
            let clones: Vec<Pod> = (0..5).map(|_| privileged(pods)).collect();
            for pod in &clones {
                assert!(is_clone(pod), "{:?}", steps(pod));
                // Only a privileged container can open the device of the hypervisor's random numbers.
                let mut config = pod.sh(&format!("{IDENTITY}; sleep 100000"));
                config["linux"]["security_context"]["privileged"] = true.into();
                let container = pod.start(&config);
                container.wait_for(pod.config["hostname"].as_str().unwrap());
                for line in container.log().lines() {
                    assert!(seen.insert(line.to_owned()), "two guests have {line:?} (batch {batch}): {seen:?}");
                }
            }
            clones.iter().for_each(Pod::remove);
        }
        assert_eq!(seen.len(), 50 * 6);
    });
}

/// Returns the limits of a container or of a pod.
fn limits(mib: u64) -> Value {
    json!({ "memory_limit_in_bytes": mib << 20 })
}

fn limited_config(pods: &Pods, mib: u64) -> Value {
    let mut config = pods.config();
    config["linux"]["resources"] = limits(mib);
    config
}

/// Starts a container with a limit, in a pod with the same limit. Returns the pod and the guest's memory in MiB.
fn limited(pods: &Pods, mib: u64) -> (Pod, u64) {
    let pod = pods.run(limited_config(pods, mib));
    let mut config = pod.sh("sleep 100000");
    config["linux"]["resources"] = limits(mib);
    let container = pod.start(&config);
    let seen = container.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").parse().unwrap();
    // The container can use its limit.
    container.sh(&format!("dd if=/dev/zero of=/dev/null bs={}M count=1 2> /dev/null", mib * 3 / 4));
    (pod, seen)
}

#[test]
fn pods_of_different_sizes_are_made_from_one_template() {
    pods("template-sizes", |pods| {
        let _templates = Templates::on();
        Templates::make_for(pods, limited_config(pods, 300));
        let off = Config::set("template = \"off\"\n");
        let (booted, whole) = limited(pods, 300);
        assert!(!is_clone(&booted));
        drop(off);
        for mib in [200, 300, 400] {
            let (pod, seen) = limited(pods, mib);
            assert!(is_clone(&pod), "{mib} MiB: {:?}", steps(&pod));
            let expected = whole + mib - 300;
            assert!(seen.abs_diff(expected) <= 12, "{mib} MiB: the guest has {seen} MiB, expected {expected} MiB");
        }
        assert_eq!(Templates::complete().len(), 1);
    });
}

#[test]
fn template_that_cannot_be_used_is_dropped_and_the_guest_boots() {
    pods("template-damaged", |pods| {
        let _templates = Templates::on();
        let template = Templates::make(pods);
        let state = template.join("state");
        let mut bytes = fs::read(&state).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::remove_file(&state).unwrap();
        fs::write(&state, bytes).unwrap();
        let pod = pods.pod();
        assert!(!is_clone(&pod));
        let log = node::log_tail(60);
        assert!(log.contains("its template cannot be used") && log.contains("a checksum is wrong"), "{log}");
        assert!(Templates::complete().is_empty());
        let container = pod.start(&pod.sh("sleep 100000"));
        assert_eq!(container.sh("echo here"), "here");
        pod.remove();
        // The next attempt to make the template is delayed.
        assert_eq!(end_delays(), 1, "the next attempt is not delayed");
        // The next pod boots, too, and its template is used afterwards.
        Templates::make(pods);
        assert!(is_clone(&pods.pod()));
    });
}

#[test]
fn template_of_another_kernel_is_not_used() {
    pods("template-stale", |pods| {
        let _templates = Templates::on();
        Templates::make(pods);
        let status = Command::new("touch").arg("/usr/local/share/husk/initrd.cpio").status().unwrap();
        assert!(status.success());
        assert!(!is_clone(&pods.pod()));
    });
}
