//! Init containers and sidecars from a pod's YAML: they start in order, and sidecars end in reverse order.

use std::fs;

use husk_e2e::BUSYBOX;
use husk_e2e::cri::{manifest, pods};

/// Each container appends a line to a file when it starts. Each sidecar appends another line on SIGTERM.
const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: in-order
spec:
  runtimeClassName: husk
  restartPolicy: Never
  initContainers:
    - name: prepare
      image: busybox
      command: ["sh", "-c", "echo prepare >> /shared/order"]
      volumeMounts: [{ name: shared, mountPath: /shared }]
      resources: { limits: { memory: 32Mi } }
    - name: proxy
      image: busybox
      restartPolicy: Always
      command: ["sh", "-c"]
      args:
        - |
          trap 'echo proxy ends >> /shared/order; exit 0' TERM
          echo proxy >> /shared/order
          nc -ll -p 8080 -e echo answered &
          until netstat -ltn | grep -q :8080; do sleep 0.1; done
          touch /shared/up
          while :; do sleep 0.1; done
      startupProbe:
        exec:
          command: ["test", "-e", "/shared/up"]
      volumeMounts: [{ name: shared, mountPath: /shared }]
      resources: { limits: { memory: 32Mi } }
    - name: migrate
      image: busybox
      command: ["sh", "-c", "echo migrate, $(nc 127.0.0.1 8080 < /dev/null) >> /shared/order"]
      volumeMounts: [{ name: shared, mountPath: /shared }]
      resources: { limits: { memory: 32Mi } }
    - name: logger
      image: busybox
      restartPolicy: Always
      command: ["sh", "-c"]
      args:
        - |
          trap 'echo logger ends >> /shared/order; exit 0' TERM
          echo logger >> /shared/order
          touch /tmp/started
          while :; do sleep 0.1; done
      startupProbe:
        exec:
          command: ["test", "-e", "/tmp/started"]
      volumeMounts: [{ name: shared, mountPath: /shared }]
      resources: { limits: { memory: 32Mi } }
  containers:
    - name: job
      image: busybox
      command: ["sh", "-c"]
      args:
        - |
          echo job, $(nc 127.0.0.1 8080 < /dev/null) >> /shared/order
          echo working
          until [ -e /shared/enough ]; do sleep 0.1; done
          echo job ends >> /shared/order
      volumeMounts: [{ name: shared, mountPath: /shared }]
      resources: { limits: { memory: 64Mi } }
  volumes:
    - name: shared
      emptyDir: {}
"#;

#[test]
fn init_containers_and_sidecars_start_and_end_in_order() {
    pods("cri-in-order", |pods| {
        let mut applied = manifest::apply(pods, POD, &[("busybox", BUSYBOX)]);
        let shared = applied.empty_dir("shared");
        applied.containers[0].wait_for("working");
        let order = || fs::read_to_string(shared.join("order")).unwrap();
        let begun = "prepare\nproxy\nmigrate, answered\nlogger\njob, answered\n";
        assert_eq!(order(), begun);
        // The test restarts a sidecar that has exited, as the kubelet does. The other containers continue to run.
        let first = applied.sidecars[1].container.id.clone();
        applied.sidecars[1].container.exec(&["sh", "-c", "kill -TERM 1"]);
        applied.restart(1);
        assert_ne!(applied.sidecars[1].container.id, first);
        assert_eq!(applied.containers[0].status()["state"], "CONTAINER_RUNNING");
        fs::write(shared.join("enough"), "").unwrap();
        assert_eq!(applied.finish(30), (vec![0], vec![0, 0]));
        let ended = "logger ends\nlogger\njob ends\nlogger ends\nproxy ends\n";
        assert_eq!(order(), format!("{begun}{ended}"));
        assert!(applied.pod.is_ready());
    });
}
