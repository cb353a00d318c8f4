//! A Create request after the launch of the sandbox has failed.

use std::fs;

use serde_json::{Value, json};

use super::model::{BUDGET, Model, within};
use super::process::{Scenarios, in_own_process};
use super::requests::{CONTAINER, create};

#[test]
fn create_runs_no_hooks_after_the_launch_has_failed() {
    in_own_process(|| {
        let mut scenarios = Scenarios::default();
        scenarios.run("Create".to_owned(), async {
            let model = Model::start(true).await;
            model.mount_share();
            model.vmm.kill();
            model.shim.sandbox.wait_end().await;
            let request = create(&model, CONTAINER);
            let path = format!("{}/config.json", request.bundle);
            let mut spec: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            // The launcher of the model has ended, so that a hook would fail with an error of its own.
            spec["hooks"] = json!({ "prestart": [{ "path": "/bin/true" }] });
            fs::write(&path, spec.to_string()).unwrap();
            let error = model.client().create(within(BUDGET), &request).await.unwrap_err().to_string();
            assert!(error.contains("the sandbox's VM has ended") && !error.contains("hook"), "{error}");
            assert!(model.shim.containers.is_empty());
            model.end().await;
        });
        scenarios.end();
    });
}
