//! Runs each request that changes state to completion.
//!
//! ttrpc drops the future of a request when the request's timeout expires, and when the caller's connection ends. A
//! dropped request would leave half of its changes behind.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Code, Request, Response};

/// The methods that change no state. A request that only reads is dropped when its caller disconnects. Otherwise, a
/// Wait request could live as long as the container.
const QUERIES: [&str; 10] = [
    "Connect",
    "Pids",
    "PingSandbox",
    "Platform",
    "SandboxMetrics",
    "SandboxStatus",
    "State",
    "Stats",
    "Wait",
    "WaitSandbox",
];

/// A method whose requests run to completion, even if the caller disconnects.
struct Completed(Arc<dyn MethodHandler + Send + Sync>);

/// Makes all methods that change state run their requests to completion.
pub fn completed(mut services: HashMap<String, Service>) -> HashMap<String, Service> {
    for service in services.values_mut() {
        let complete = |(name, method): (String, Box<dyn MethodHandler + Send + Sync>)| {
            let only_reads = QUERIES.contains(&name.as_str());
            let method = if only_reads { method } else { Box::new(Completed(Arc::from(method))) };
            (name, method)
        };
        service.methods = service.methods.drain().map(complete).collect();
    }
    services
}

#[async_trait]
impl MethodHandler for Completed {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let method = Arc::clone(&self.0);
        let work = tokio::spawn(async move { method.handler(context, request).await });
        work.await.unwrap_or_else(|error| {
            let text = format!("failed to complete the request: {error}");
            Err(ttrpc::error::get_rpc_status(Code::INTERNAL, text))
        })
    }
}
