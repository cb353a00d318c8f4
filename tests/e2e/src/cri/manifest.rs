//! Runs a pod from a YAML manifest as the kubelet does: creates volumes, and translates the manifest to CRI requests.
//!
//! Supports the fields that the examples in deploy/kubernetes use, and the fields of init containers and sidecars.
//! Fails if the manifest has a field that is not supported.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::pod::{ExecResult, Pod, PodContainer, Pods, need_image, text};
use crate::node;

/// The kubelet's directory of pod volumes.
const POD_VOLUMES: &str = "/var/lib/kubelet/pods";
/// The kubelet's default probe period. Exec probes do not run more often, because each exec probe starts a program
/// in the container.
const PROBE_PERIOD: Duration = Duration::from_secs(10);
/// Paths that the kubelet masks in unprivileged containers (Kubernetes, pkg/securitycontext/util.go).
const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
];
/// Paths that the kubelet makes read-only in unprivileged containers.
pub const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A running pod, with its containers in the manifest's order.
pub struct AppliedManifest {
    /// The pod.
    pub pod: Pod,
    /// The pod's started containers.
    pub containers: Vec<PodContainer>,
    /// The pod's sidecars (init containers with `restartPolicy: Always`), in the order of their start.
    pub sidecars: Vec<Sidecar>,
    probes: Vec<Option<Probe>>,
    dir: PathBuf,
}

/// A sidecar. It is started among the init containers, and runs until the pod's containers have exited.
pub struct Sidecar {
    /// The current container; a restart replaces it.
    pub container: PodContainer,
    config: Value,
    probe: Option<Probe>,
}

/// A readiness or startup probe.
#[derive(Debug)]
enum Probe {
    /// Succeeds if a command in the container succeeds.
    Exec(Vec<String>),
    /// Succeeds if an HTTP server in the pod responds with status 200.
    Http { port: u16, path: String },
}

/// Runs the pod of a manifest. `images` maps the manifest's image names to local images.
#[track_caller]
pub fn apply(pods: &Pods, manifest: &str, images: &[(&str, &str)]) -> AppliedManifest {
    let manifest: Value = serde_yaml_ng::from_str(manifest).unwrap();
    assert_eq!((&manifest["apiVersion"], &manifest["kind"]), (&json!("v1"), &json!("Pod")));
    let spec = &manifest["spec"];
    known(
        spec,
        &[
            "runtimeClassName",
            "automountServiceAccountToken",
            "restartPolicy",
            "securityContext",
            "initContainers",
            "containers",
            "volumes",
        ],
    );
    assert_eq!(spec["runtimeClassName"], "husk");
    let mut config = pods.config();
    let uid = text(&config["metadata"]["uid"]);
    if let Some(annotations) = manifest["metadata"].get("annotations") {
        config["annotations"] = annotations.clone();
    }
    let dir = Path::new(POD_VOLUMES).join(&uid);
    let volumes = volumes(spec, &dir);
    let containers = spec["containers"].as_array().unwrap();
    let privileged = containers.iter().any(|container| container["securityContext"]["privileged"] == true);
    config["linux"]["security_context"]["privileged"] = privileged.into();
    let limits: Vec<Limits> = containers.iter().map(Limits::parse).collect();
    let init = spec["initContainers"].as_array().map(Vec::as_slice).unwrap_or_default();
    // The pod's limits are the sums of the limits of its sidecars and containers, which run at the same time. The other
    // init containers exit before the containers start. In the tests, init containers need no more resources than the
    // containers.
    let at_once: Vec<Limits> = init.iter().filter(|one| is_sidecar(one)).chain(containers).map(Limits::parse).collect();
    if at_once.iter().all(|limits| limits.memory > 0) {
        config["linux"]["resources"] =
            json!({ "memory_limit_in_bytes": at_once.iter().map(|limits| limits.memory).sum::<i64>() });
    }
    if at_once.iter().all(|limits| limits.milli_cpu > 0) {
        config["linux"]["resources"]["cpu_period"] = 100_000.into();
        config["linux"]["resources"]["cpu_quota"] =
            (at_once.iter().map(|limits| limits.milli_cpu).sum::<i64>() * 100).into();
    }
    let pod = pods.run(config);
    let configure = |container: &Value, limits: &Limits| {
        known(
            container,
            &[
                "name",
                "image",
                "command",
                "args",
                "env",
                "ports",
                "securityContext",
                "readinessProbe",
                "startupProbe",
                "restartPolicy",
                "volumeMounts",
                "resources",
            ],
        );
        let image = text(&container["image"]);
        let image =
            images.iter().find(|(name, _)| *name == image).unwrap_or_else(|| panic!("no local image for {image}")).1;
        need_image(image);
        let mut config = pod.sh("");
        config["metadata"]["name"] = container["name"].clone();
        config["image"]["image"] = image.into();
        config["log_path"] = format!("{}.log", text(&container["name"])).into();
        config["command"] = container.get("command").cloned().unwrap_or_else(|| json!([]));
        config["args"] = container.get("args").cloned().unwrap_or_else(|| json!([]));
        let env = container["env"].as_array().into_iter().flatten();
        config["envs"] = env.map(|one| json!({ "key": one["name"], "value": one["value"] })).collect();
        let mounts = container["volumeMounts"].as_array().into_iter().flatten();
        config["mounts"] = mounts.map(|mount| self::mount(mount, &volumes)).collect();
        limits.set(&mut config["linux"]["resources"]);
        security(&mut config["linux"]["security_context"], &spec["securityContext"], &container["securityContext"]);
        config
    };
    let mut sidecars = Vec::new();
    for container in init {
        let config = configure(container, &Limits::parse(container));
        let started = pod.start(&config);
        if is_sidecar(container) {
            let sidecar = Sidecar { container: started, config, probe: Probe::parse(container, "startupProbe") };
            // The next container starts only after the sidecar's startup probe has succeeded.
            sidecar.wait_started(&pod);
            sidecars.push(sidecar);
        } else {
            assert_eq!(started.wait(), (0, "Completed".into()), "{}", started.log());
            started.remove();
        }
    }
    let started = containers.iter().zip(&limits).map(|(container, limits)| {
        assert!(
            !is_sidecar(container) && container.get("startupProbe").is_none(),
            "startup probes and restart policies are supported for sidecars only"
        );
        pod.start(&configure(container, limits))
    });
    let started = started.collect();
    let probes = containers.iter().map(|container| Probe::parse(container, "readinessProbe")).collect();
    AppliedManifest { pod, containers: started, sidecars, probes, dir }
}

fn is_sidecar(container: &Value) -> bool {
    container["restartPolicy"] == "Always"
}

impl Probe {
    #[track_caller]
    fn parse(container: &Value, name: &str) -> Option<Self> {
        let probe = container.get(name)?;
        known(probe, &["exec", "httpGet", "periodSeconds"]);
        if let Some(command) = probe["exec"]["command"].as_array() {
            return Some(Self::Exec(command.iter().map(text).collect()));
        }
        let (port, path) = (probe["httpGet"]["port"].as_u64().unwrap(), text(&probe["httpGet"]["path"]));
        Some(Self::Http { port: port.try_into().unwrap(), path })
    }

    /// Runs the probe once.
    ///
    /// # Errors
    /// The response of a failed probe.
    fn run(&self, pod: &Pod, container: &PodContainer) -> Result<(), String> {
        match self {
            Probe::Exec(command) => {
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                match container.try_exec(&command) {
                    Ok(ExecResult { code: 0, .. }) => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            }
            Probe::Http { port, path } => get(pod, *port, path).map(drop),
        }
    }
}

impl Sidecar {
    /// Waits until the startup probe succeeds.
    #[track_caller]
    fn wait_started(&self, pod: &Pod) {
        let Some(probe) = &self.probe else { return };
        let mut last = Err("never probed".to_owned());
        let started = node::eventually(crate::command::TIMEOUT, || {
            last = probe.run(pod, &self.container);
            last.is_ok().then_some(())
        });
        assert!(
            started.is_some(),
            "{probe:?} did not succeed: {last:?}; the container's log:\n{}",
            self.container.log()
        );
    }
}

/// Sends an HTTP GET from the node to the pod. Returns the response with its headers if the status is 200.
///
/// # Errors
/// The I/O error, or the response if its status is not 200.
fn get(pod: &Pod, port: u16, path: &str) -> Result<String, String> {
    let exchange = || {
        let addresses: Vec<SocketAddr> = pod.addresses().iter().map(|ip| (*ip, port).into()).collect();
        let mut stream = TcpStream::connect(addresses.as_slice())?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|error: io::Error| error.to_string())?;
    if answer.split_whitespace().nth(1) == Some("200") { Ok(answer) } else { Err(answer) }
}

impl AppliedManifest {
    /// Waits until the readiness probes of all containers succeed.
    #[track_caller]
    pub fn wait_ready(&self, limit: Duration) {
        for (container, probe) in self.containers.iter().zip(&self.probes) {
            let Some(probe) = probe else { continue };
            let mut last = Err("never probed".to_owned());
            let ready = node::eventually(limit, || {
                if let Probe::Exec(_) = probe {
                    std::thread::sleep(PROBE_PERIOD);
                }
                assert_eq!(
                    container.status()["state"],
                    "CONTAINER_RUNNING",
                    "the container is not running; its log:\n{}",
                    container.log()
                );
                last = probe.run(&self.pod, container);
                last.is_ok().then_some(())
            });
            assert!(ready.is_some(), "{probe:?} did not succeed: {last:?}; the container's log:\n{}", container.log());
        }
    }

    /// Sends an HTTP GET from the node to the pod. Returns the response with its headers if the status is 200.
    ///
    /// # Errors
    /// The I/O error, or the response if its status is not 200.
    pub fn get(&self, port: u16, path: &str) -> Result<String, String> {
        get(&self.pod, port, path)
    }

    /// Waits until a sidecar has exited. Then starts the sidecar again, in a new container of the same name.
    #[track_caller]
    pub fn restart(&mut self, number: usize) {
        let sidecar = &mut self.sidecars[number];
        let attempt = sidecar.config["metadata"]["attempt"].as_u64().unwrap();
        sidecar.config["metadata"]["attempt"] = (attempt + 1).into();
        sidecar.container.wait();
        let next = self.pod.start(&sidecar.config);
        std::mem::replace(&mut sidecar.container, next).remove();
        sidecar.wait_started(&self.pod);
    }

    /// Waits until all containers have exited, then stops the sidecars in reverse order. Returns the exit codes of
    /// the containers and of the sidecars, each in the manifest's order.
    #[track_caller]
    pub fn finish(&self, grace: u32) -> (Vec<i64>, Vec<i64>) {
        let codes = self.containers.iter().map(|container| container.wait().0).collect();
        for sidecar in self.sidecars.iter().rev() {
            sidecar.container.stop(grace);
        }
        (codes, self.sidecars.iter().map(|sidecar| sidecar.container.wait().0).collect())
    }

    /// Returns the host path of an emptyDir.
    pub fn empty_dir(&self, name: &str) -> PathBuf {
        self.dir.join("volumes/kubernetes.io~empty-dir").join(name)
    }
}

impl Drop for AppliedManifest {
    fn drop(&mut self) {
        // Like the kubelet, removes the volumes only after the pod has stopped.
        if !std::thread::panicking() {
            self.pod.stop();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Creates the pod's volumes. Returns a map from the volumes' names to their paths.
fn volumes(spec: &Value, dir: &Path) -> BTreeMap<String, PathBuf> {
    let volumes = spec["volumes"].as_array().into_iter().flatten().map(|volume| {
        known(volume, &["name", "emptyDir"]);
        known(&volume["emptyDir"], &["sizeLimit"]);
        let path = dir.join("volumes/kubernetes.io~empty-dir").join(text(&volume["name"]));
        fs::create_dir_all(&path).unwrap();
        // The kubelet sets mode 0777. With an fsGroup, it also sets the group and the setgid bit (Kubernetes,
        // pkg/volume/emptydir).
        fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        if let Some(group) = spec["securityContext"]["fsGroup"].as_u64() {
            std::os::unix::fs::chown(&path, None, Some(u32::try_from(group).unwrap())).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o2777)).unwrap();
        }
        (text(&volume["name"]), path)
    });
    volumes.collect()
}

fn mount(mount: &Value, volumes: &BTreeMap<String, PathBuf>) -> Value {
    known(mount, &["name", "mountPath", "readOnly", "subPath"]);
    let path = volumes[&text(&mount["name"])].join(text(&mount["subPath"]));
    json!({
        "host_path": path.to_string_lossy(),
        "container_path": mount["mountPath"],
        "readonly": mount["readOnly"] == true,
    })
}

/// Translates the security contexts of pod and container to the CRI's security context.
fn security(into: &mut Value, pod: &Value, container: &Value) {
    known(pod, &["runAsUser", "runAsGroup", "fsGroup"]);
    known(
        container,
        &[
            "privileged",
            "runAsUser",
            "runAsGroup",
            "runAsNonRoot",
            "readOnlyRootFilesystem",
            "allowPrivilegeEscalation",
            "capabilities",
            "appArmorProfile",
        ],
    );
    if let Some(profile) = container.get("appArmorProfile") {
        known(profile, &["type"]);
        into["apparmor"] = json!({ "profile_type": profile["type"] });
    }
    let either = |name: &str| container.get(name).or_else(|| pod.get(name)).cloned();
    if let Some(user) = either("runAsUser") {
        into["run_as_user"] = json!({ "value": user });
    }
    if let Some(group) = either("runAsGroup") {
        into["run_as_group"] = json!({ "value": group });
    }
    if let Some(group) = pod.get("fsGroup") {
        into["supplemental_groups"] = json!([group]);
    }
    let privileged = container["privileged"] == true;
    into["privileged"] = privileged.into();
    into["readonly_rootfs"] = (container["readOnlyRootFilesystem"] == true).into();
    into["no_new_privs"] = (container["allowPrivilegeEscalation"] == false).into();
    let list = |name: &str| container["capabilities"].get(name).cloned().unwrap_or_else(|| json!([]));
    into["capabilities"] = json!({ "add_capabilities": list("add"), "drop_capabilities": list("drop") });
    if !privileged {
        into["masked_paths"] = json!(MASKED);
        into["readonly_paths"] = json!(READ_ONLY);
    }
}

/// Resource limits of a container. 0 means no limit.
struct Limits {
    memory: i64,
    milli_cpu: i64,
}

impl Limits {
    fn parse(container: &Value) -> Self {
        known(&container["resources"], &["limits"]);
        let limits = &container["resources"]["limits"];
        known(limits, &["memory", "cpu"]);
        Self { memory: bytes(&text(&limits["memory"])), milli_cpu: text(&limits["cpu"]).parse().unwrap_or(0) * 1000 }
    }

    fn set(&self, into: &mut Value) {
        if self.memory > 0 {
            into["memory_limit_in_bytes"] = self.memory.into();
        }
        if self.milli_cpu > 0 {
            into["cpu_period"] = 100_000.into();
            into["cpu_quota"] = (self.milli_cpu * 100).into();
            into["cpu_shares"] = (self.milli_cpu * 1024 / 1000).into();
        }
    }
}

/// Parses a memory quantity such as `64Mi`, and returns the number of bytes. Returns 0 for an empty string.
fn bytes(quantity: &str) -> i64 {
    let (number, shift) = match quantity.split_at(quantity.len().saturating_sub(2)) {
        (number, "Mi") => (number, 20),
        (number, "Gi") => (number, 30),
        _ => (quantity, 0),
    };
    number.parse::<i64>().unwrap_or(0) << shift
}

/// Fails if `value` has a field that is not in `fields`. Without this check, a test could silently ignore a field of
/// the manifest.
#[track_caller]
fn known(value: &Value, fields: &[&str]) {
    let keys = value.as_object().into_iter().flat_map(Map::keys);
    let unknown: Vec<&String> = keys.filter(|key| !fields.contains(&key.as_str())).collect();
    assert!(unknown.is_empty(), "unsupported fields in the manifest: {unknown:?}");
}
