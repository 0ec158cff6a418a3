BEGIN TRANSACTION;
CREATE TABLE accounts (
	id VARCHAR(64) NOT NULL, 
	username VARCHAR(255) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_accounts PRIMARY KEY (id), 
	CONSTRAINT uq_accounts_username UNIQUE (username)
);
INSERT INTO "accounts" VALUES('01kqsdr2qtpqwkgkz5jc5z4rcd','ada','Ada','user','2026-05-04 12:00:00.250000');
INSERT INTO "accounts" VALUES('01kqsdr2qty8e0gdcy3vtssqff','grace','grace','organization','2026-05-04 12:00:00.250000');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE deployments (
	owner VARCHAR(255) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	model VARCHAR(255) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	hardware VARCHAR(255) NOT NULL, 
	min_instances INTEGER NOT NULL, 
	max_instances INTEGER NOT NULL, 
	created_at DATETIME NOT NULL, 
	defaults JSON NOT NULL, 
	CONSTRAINT pk_deployments PRIMARY KEY (owner, name), 
	CONSTRAINT fk_deployments_account_id FOREIGN KEY(account_id) REFERENCES accounts (id)
);
INSERT INTO "deployments" VALUES('ada','small','01kqsdr2qtpqwkgkz5jc5z4rcd',1,'batouresearch/high-resolution-controlnet-tile','68cebf7b0a85a710df3f49fb6fb857a9461afff13c00dcf0865ec160c6fbdafe','cpu',0,1,'2026-05-04 12:00:09.250000','{"steps": 5}');
INSERT INTO "deployments" VALUES('ada','faces','01kqsdr2qtpqwkgkz5jc5z4rcd',1,'ada/portraits','7cefa7f2ea3856e0d3dd0d335edd5f6650ddba67667ef0ad84b4c8f6b54d4395','cpu',0,0,'2026-05-04 12:00:10.250000','{}');
INSERT INTO "deployments" VALUES('ada','older','01kqsdr2qtpqwkgkz5jc5z4rcd',2,'batouresearch/high-resolution-controlnet-tile','cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd','cpu',0,2,'2026-05-04 12:00:12.250000','{}');
CREATE TABLE events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	prediction_id VARCHAR(64) NOT NULL, 
	attempt INTEGER NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	data JSON, 
	at DATETIME NOT NULL, 
	CONSTRAINT fk_events_prediction_id FOREIGN KEY(prediction_id) REFERENCES predictions (id)
);
INSERT INTO "events" VALUES(1,'01kqsdrgdab2s7k2b7dkweg4p5',1,'logs','"one\n"','2026-05-04 12:00:17.250000');
INSERT INTO "events" VALUES(2,'01kqsdrgdab2s7k2b7dkweg4p5',1,'output','{"$file": "01kqsdrkb2gc47h4rc06qxmkjs", "name": "out-0.png", "type": "image/png", "size": 11}','2026-05-04 12:00:17.250000');
INSERT INTO "events" VALUES(3,'01kqsdrgdab2s7k2b7dkweg4p5',1,'logs','"two\n"','2026-05-04 12:00:18.250000');
INSERT INTO "events" VALUES(4,'01kqsdrgdab2s7k2b7dkweg4p5',1,'done','"succeeded"','2026-05-04 12:00:18.250000');
INSERT INTO "events" VALUES(5,'01kqsdrn9jvdzz40csasmq71xx',1,'logs','"The worker was lost: its process ended with signal 9.\n"','2026-05-04 12:00:21.250000');
INSERT INTO "events" VALUES(6,'01kqsdrn9jvdzz40csasmq71xx',1,'restart',NULL,'2026-05-04 12:00:21.250000');
INSERT INTO "events" VALUES(7,'01kqsdrn9jvdzz40csasmq71xx',2,'logs','"The worker was lost: its process ended with signal 9.\n"','2026-05-04 12:00:22.250000');
INSERT INTO "events" VALUES(8,'01kqsdrn9jvdzz40csasmq71xx',2,'done','"failed"','2026-05-04 12:00:22.250000');
CREATE TABLE files (
	id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	prediction_id VARCHAR(64), 
	name VARCHAR(255) NOT NULL, 
	content_type VARCHAR(255) NOT NULL, 
	size BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	md5 VARCHAR(32) NOT NULL, 
	metadata JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	CONSTRAINT pk_files PRIMARY KEY (id), 
	CONSTRAINT fk_files_account_id FOREIGN KEY(account_id) REFERENCES accounts (id)
);
INSERT INTO "files" VALUES('01kqsdrfe2b5zkcfr3dy60kgb7','01kqsdr2qtpqwkgkz5jc5z4rcd',NULL,'cat.png','image/png',28,'1e044b438d24ef5e13f81057f541422c42fe97ae2b7f37568412683ef6f80137','fa23e87ee81b99d1b3cda1a8bf068968','{"a": [1, null]}','2026-05-04 12:00:13.250000','2026-05-05 12:00:13.250000');
INSERT INTO "files" VALUES('01kqsdrgday9bpbxtgrggk25v1','01kqsdr2qtpqwkgkz5jc5z4rcd','01kqsdrgdab2s7k2b7dkweg4p5','file.png','image/png',8,'4c4b6a3be1314ab86138bef4314dde022e600960d8689a2c8f8631802d20dab6','e9dd2797018cad79186e03e8c5aec8dc','{}','2026-05-04 12:00:14.250000',NULL);
INSERT INTO "files" VALUES('01kqsdrkb2gc47h4rc06qxmkjs','01kqsdr2qtpqwkgkz5jc5z4rcd','01kqsdrgdab2s7k2b7dkweg4p5','out-0.png','image/png',11,'7bc5514f076d58d169e26604967ac89ea872515cd8a2d1dd9ad4d6ebfc50890a','4ff5ab623ee8de76c86044c27111d1c4','{}','2026-05-04 12:00:17.250000',NULL);
CREATE TABLE idempotency_keys (
	account_id VARCHAR(64) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	request_hash VARCHAR(64) NOT NULL, 
	prediction_id VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_idempotency_keys PRIMARY KEY (account_id, "key"), 
	CONSTRAINT fk_idempotency_keys_prediction_id FOREIGN KEY(prediction_id) REFERENCES predictions (id)
);
INSERT INTO "idempotency_keys" VALUES('01kqsdr2qtpqwkgkz5jc5z4rcd','k1','hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh','01kqsdrgdab2s7k2b7dkweg4p5','2026-05-04 12:00:14.250000');
CREATE TABLE predictions (
	id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	token_id VARCHAR(64), 
	model VARCHAR(255) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	deployment VARCHAR(255), 
	input JSON NOT NULL, 
	output JSON, 
	logs TEXT NOT NULL, 
	error TEXT, 
	status VARCHAR(16) NOT NULL, 
	source VARCHAR(16) NOT NULL, 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	completed_at DATETIME, 
	deadline DATETIME, 
	data_removed BOOLEAN NOT NULL, 
	predict_seconds FLOAT, 
	progress FLOAT NOT NULL, 
	webhook TEXT, 
	webhook_events JSON NOT NULL, 
	share_token VARCHAR(64), 
	estimated_seconds FLOAT NOT NULL, 
	attempt INTEGER NOT NULL, 
	losses INTEGER NOT NULL, 
	worker VARCHAR(255), 
	lease_until DATETIME, 
	CONSTRAINT pk_predictions PRIMARY KEY (id), 
	CONSTRAINT fk_predictions_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
	CONSTRAINT uq_predictions_share_token UNIQUE (share_token)
);
INSERT INTO "predictions" VALUES('01kqsdrgdab2s7k2b7dkweg4p5','01kqsdr2qtpqwkgkz5jc5z4rcd','01kqsdr2qtec2t8fdmym54x0kz','tegula/upscale','4786f29965eb4c0c1bb85a44650e00083057e3f5a9f8a86b896647d70fb71e7e',NULL,'{"image": {"$file": "01kqsdrgday9bpbxtgrggk25v1", "name": "file.png", "type": "image/png", "size": 8}, "prompt": "\u00fcn\u00ef"}','{"$file": "01kqsdrkb2gc47h4rc06qxmkjs", "name": "out-0.png", "type": "image/png", "size": 11}','one
two
',NULL,'succeeded','web','2026-05-04 12:00:14.250000','2026-05-04 12:00:15.250000','2026-05-04 12:00:18.250000',NULL,0,3.0,1.0,'https://example.com/hook','["start", "output", "logs", "completed"]','ak8vg8hfgrye3w026zbzjw439chqgwq0w0ahz10a',3.5,1,0,NULL,NULL);
INSERT INTO "predictions" VALUES('01kqsdrn9jvdzz40csasmq71xx','01kqsdr2qtpqwkgkz5jc5z4rcd',NULL,'batouresearch/high-resolution-controlnet-tile','68cebf7b0a85a710df3f49fb6fb857a9461afff13c00dcf0865ec160c6fbdafe',NULL,'{"image": "https://example.com/a.png"}',NULL,'The worker was lost: its process ended with signal 9.
The worker was lost: its process ended with signal 9.
','The worker that ran this prediction died or hung, twice: its process ended with signal 9.','failed','api','2026-05-04 12:00:19.250000','2026-05-04 12:00:21.250000','2026-05-04 12:00:22.250000',NULL,0,1.0,0.0,NULL,'["output", "completed"]',NULL,0.0,2,2,NULL,NULL);
INSERT INTO "predictions" VALUES('01kqsdrs6jz8rwcyja5by341ya','01kqsdr2qtpqwkgkz5jc5z4rcd',NULL,'ada/portraits','7cefa7f2ea3856e0d3dd0d335edd5f6650ddba67667ef0ad84b4c8f6b54d4395','ada/faces','{"image": "https://example.com/a.png"}',NULL,'',NULL,'starting','api','2026-05-04 12:00:23.250000',NULL,NULL,'2027-06-08 12:00:23.250000',0,NULL,0.0,NULL,'["output", "completed"]',NULL,0.0,0,0,NULL,NULL);
INSERT INTO "predictions" VALUES('01kqsdrt5tnfmdbbcrqzx7rj2b','01kqsdr2qty8e0gdcy3vtssqff',NULL,'batouresearch/high-resolution-controlnet-tile','efefefefefefefefefefefefefefefefefefefefefefefefefefefefefefefef',NULL,'{"image": "https://example.com/a.png"}',NULL,'',NULL,'starting','api','2026-05-04 12:00:24.250000',NULL,NULL,NULL,0,NULL,0.0,NULL,'["output", "completed"]',NULL,0.0,0,0,NULL,NULL);
INSERT INTO "predictions" VALUES('01kqsdrv52t3p1s56shmtapkw8','01kqsdr2qtpqwkgkz5jc5z4rcd',NULL,'tegula/upscale','4786f29965eb4c0c1bb85a44650e00083057e3f5a9f8a86b896647d70fb71e7e',NULL,'{}',NULL,'',NULL,'canceled','api','2026-05-04 12:00:25.250000',NULL,'2026-05-04 12:00:26.250000',NULL,1,NULL,0.0,NULL,'["output", "completed"]',NULL,0.0,0,0,NULL,NULL);
INSERT INTO "predictions" VALUES('01kqsdrw4afn9v55at5hag2d9f','01kqsdr2qtpqwkgkz5jc5z4rcd',NULL,'batouresearch/high-resolution-controlnet-tile','68cebf7b0a85a710df3f49fb6fb857a9461afff13c00dcf0865ec160c6fbdafe',NULL,'{"image": "https://example.com/a.png"}',NULL,'',NULL,'processing','api','2026-05-04 12:00:26.250000','2026-05-04 12:00:27.250000',NULL,NULL,0,NULL,0.0,NULL,'["output", "completed"]',NULL,0.0,1,0,'host:1:cpu','2026-05-04 12:00:42.250000');
CREATE TABLE secret_keys (
	id INTEGER NOT NULL, 
	owner VARCHAR(64) NOT NULL, 
	value VARCHAR(128) NOT NULL, 
	created_at DATETIME NOT NULL, 
	retired_at DATETIME, 
	CONSTRAINT pk_secret_keys PRIMARY KEY (id)
);
INSERT INTO "secret_keys" VALUES(1,'signing','b4d2f501197dfa8730cf34d6cadf56dd6c5946fb64809044113b4daccf916223','2026-05-04 12:00:00.250000',NULL);
INSERT INTO "secret_keys" VALUES(2,'01kqsdr2qtpqwkgkz5jc5z4rcd','whsec_ZF7O6F6OJdaqG3vqrrbOzi0f370cgJI0','2026-05-04 12:00:03.250000','2026-05-05 12:00:03.250000');
INSERT INTO "secret_keys" VALUES(3,'01kqsdr2qtpqwkgkz5jc5z4rcd','whsec_thSsgLMjwBhWymhoLe+BdpsQfNKyNrFg','2026-05-04 12:00:03.250000',NULL);
CREATE TABLE tokens (
	id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	hint VARCHAR(8) NOT NULL, 
	created_at DATETIME NOT NULL, 
	last_used_at DATETIME, 
	revoked_at DATETIME, 
	CONSTRAINT pk_tokens PRIMARY KEY (id), 
	CONSTRAINT fk_tokens_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
	CONSTRAINT uq_tokens_hash UNIQUE (hash)
);
INSERT INTO "tokens" VALUES('01kqsdr2qtec2t8fdmym54x0kz','01kqsdr2qtpqwkgkz5jc5z4rcd','laptop','458994bd28c4462bd3f80e6e0f776628faee6a9c264cd977e871b9a512f40b96','bvf6','2026-05-04 12:00:00.250000','2026-05-04 12:00:02.250000',NULL);
INSERT INTO "tokens" VALUES('01kqsdr3q2bb1c0jqc5jebm8c8','01kqsdr2qty8e0gdcy3vtssqff','old','8cf100a0837e92d53baecf5e41b7c1627f2310587e5808fe8446e7d5e2872cb8','pbqg','2026-05-04 12:00:01.250000',NULL,'2026-05-04 12:00:02.250000');
CREATE TABLE usage (
	prediction_id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	token_id VARCHAR(64), 
	model VARCHAR(255) NOT NULL, 
	predict_seconds FLOAT NOT NULL, 
	completed_at DATETIME NOT NULL, 
	CONSTRAINT pk_usage PRIMARY KEY (prediction_id)
);
INSERT INTO "usage" VALUES('01kqsdrgdab2s7k2b7dkweg4p5','01kqsdr2qtpqwkgkz5jc5z4rcd','01kqsdr2qtec2t8fdmym54x0kz','tegula/upscale',3.0,'2026-05-04 12:00:18.250000');
INSERT INTO "usage" VALUES('01kqsdrn9jvdzz40csasmq71xx','01kqsdr2qtpqwkgkz5jc5z4rcd',NULL,'batouresearch/high-resolution-controlnet-tile',1.0,'2026-05-04 12:00:22.250000');
CREATE TABLE user_models (
	owner VARCHAR(255) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	visibility VARCHAR(16) NOT NULL, 
	hardware VARCHAR(255) NOT NULL, 
	created_at DATETIME NOT NULL, 
	description TEXT NOT NULL, 
	readme TEXT NOT NULL, 
	github_url TEXT, 
	paper_url TEXT, 
	license_url TEXT, 
	weights_url TEXT, 
	cover_image_url TEXT, 
	CONSTRAINT pk_user_models PRIMARY KEY (owner, name), 
	CONSTRAINT fk_user_models_account_id FOREIGN KEY(account_id) REFERENCES accounts (id)
);
INSERT INTO "user_models" VALUES('ada','portraits','01kqsdr2qtpqwkgkz5jc5z4rcd','private','cpu','2026-05-04 12:00:04.250000','Faces','# Faces','https://example.com/g',NULL,NULL,NULL,NULL);
INSERT INTO "user_models" VALUES('grace','open','01kqsdr2qty8e0gdcy3vtssqff','public','cpu','2026-05-04 12:00:05.250000','','',NULL,NULL,NULL,NULL,NULL);
CREATE TABLE user_versions (
	id VARCHAR(64) NOT NULL, 
	model VARCHAR(255) NOT NULL, 
	base_model VARCHAR(255) NOT NULL, 
	base_version VARCHAR(64) NOT NULL, 
	defaults JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_user_versions PRIMARY KEY (id)
);
INSERT INTO "user_versions" VALUES('7c6716cec7341953180cf15ac0ebe47a07ec569053833312f6959ba7569dfaa7','ada/portraits','batouresearch/high-resolution-controlnet-tile','68cebf7b0a85a710df3f49fb6fb857a9461afff13c00dcf0865ec160c6fbdafe','{"resemblance": 0.4}','2026-05-04 12:00:06.250000');
INSERT INTO "user_versions" VALUES('7cefa7f2ea3856e0d3dd0d335edd5f6650ddba67667ef0ad84b4c8f6b54d4395','ada/portraits','tegula/upscale','4786f29965eb4c0c1bb85a44650e00083057e3f5a9f8a86b896647d70fb71e7e','{"scale": 3}','2026-05-04 12:00:07.250000');
INSERT INTO "user_versions" VALUES('7db96d4d754ce2ccd77815eff468bb151b8efecfce12665218a98715abc05ec7','grace/open','batouresearch/high-resolution-controlnet-tile','abababababababababababababababababababababababababababababababab','{"steps": 6}','2026-05-04 12:00:08.250000');
CREATE TABLE webhooks (
	id VARCHAR(64) NOT NULL, 
	prediction_id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	url TEXT NOT NULL, 
	receiver VARCHAR(255) NOT NULL, 
	event VARCHAR(16) NOT NULL, 
	body TEXT, 
	state VARCHAR(16) NOT NULL, 
	attempts INTEGER NOT NULL, 
	next_at DATETIME NOT NULL, 
	created_at DATETIME NOT NULL, 
	finished_at DATETIME, 
	last_status INTEGER, 
	last_error TEXT, 
	CONSTRAINT pk_webhooks PRIMARY KEY (id), 
	CONSTRAINT fk_webhooks_prediction_id FOREIGN KEY(prediction_id) REFERENCES predictions (id)
);
INSERT INTO "webhooks" VALUES('msg_01kqsdrhcjxj0tpf0gh9p8pvcr','01kqsdrgdab2s7k2b7dkweg4p5','01kqsdr2qtpqwkgkz5jc5z4rcd','https://example.com/hook','example.com','start','{"id":"01kqsdrgdab2s7k2b7dkweg4p5","model":"tegula/upscale","version":"4786f29965eb4c0c1bb85a44650e00083057e3f5a9f8a86b896647d70fb71e7e","input":{"image":"http://127.0.0.1:8000/o/01kqsdrgday9bpbxtgrggk25v1.sf82TUqZ8nPWYoUGIP810oLOzIrhjGtP/file.png","prompt":"ünï"},"output":null,"logs":"","error":null,"status":"processing","source":"web","data_removed":false,"created_at":"2026-05-04T12:00:14.250Z","started_at":"2026-05-04T12:00:15.250Z","completed_at":null,"metrics":{"progress":0.0},"urls":{"get":"http://127.0.0.1:8000/v1/predictions/01kqsdrgdab2s7k2b7dkweg4p5","cancel":"http://127.0.0.1:8000/v1/predictions/01kqsdrgdab2s7k2b7dkweg4p5/cancel","web":"http://127.0.0.1:8000/p/01kqsdrgdab2s7k2b7dkweg4p5","stream":"http://127.0.0.1:8000/v1/files/streams/01kqsdrgdab2s7k2b7dkweg4p5.X6MIWqqjIET6j1s73eqHRmCYnl4L7sRJ"},"webhook":"https://example.com/hook","webhook_events_filter":["start","output","logs","completed"]}','delivered',1,'2026-05-04 12:00:28.250000','2026-05-04 12:00:15.250000','2026-05-04 12:00:19.250000',200,NULL);
INSERT INTO "webhooks" VALUES('msg_01kqsdrkb23wcz8mxdknbfmk3n','01kqsdrgdab2s7k2b7dkweg4p5','01kqsdr2qtpqwkgkz5jc5z4rcd','https://example.com/hook','example.com','logs',NULL,'pending',0,'2026-05-04 12:00:17.250000','2026-05-04 12:00:17.250000',NULL,NULL,NULL);
INSERT INTO "webhooks" VALUES('msg_01kqsdrkb2xgh8js9jvpjyc1pm','01kqsdrgdab2s7k2b7dkweg4p5','01kqsdr2qtpqwkgkz5jc5z4rcd','https://example.com/hook','example.com','output',NULL,'pending',0,'2026-05-04 12:00:17.250000','2026-05-04 12:00:17.250000',NULL,NULL,NULL);
INSERT INTO "webhooks" VALUES('msg_01kqsdrmaafkrrgpwmwysavwyq','01kqsdrgdab2s7k2b7dkweg4p5','01kqsdr2qtpqwkgkz5jc5z4rcd','https://example.com/hook','example.com','completed','{"id":"01kqsdrgdab2s7k2b7dkweg4p5","model":"tegula/upscale","version":"4786f29965eb4c0c1bb85a44650e00083057e3f5a9f8a86b896647d70fb71e7e","input":{"image":"http://127.0.0.1:8000/o/01kqsdrgday9bpbxtgrggk25v1.sf82TUqZ8nPWYoUGIP810oLOzIrhjGtP/file.png","prompt":"ünï"},"output":"http://127.0.0.1:8000/o/01kqsdrkb2gc47h4rc06qxmkjs.V0C5UonqXdKwroPYqC9wLeDuwDvyDO2i/out-0.png","logs":"one\ntwo\n","error":null,"status":"succeeded","source":"web","data_removed":false,"created_at":"2026-05-04T12:00:14.250Z","started_at":"2026-05-04T12:00:15.250Z","completed_at":"2026-05-04T12:00:18.250Z","metrics":{"total_time":4.0,"predict_time":3.0},"urls":{"get":"http://127.0.0.1:8000/v1/predictions/01kqsdrgdab2s7k2b7dkweg4p5","cancel":"http://127.0.0.1:8000/v1/predictions/01kqsdrgdab2s7k2b7dkweg4p5/cancel","web":"http://127.0.0.1:8000/p/01kqsdrgdab2s7k2b7dkweg4p5","stream":"http://127.0.0.1:8000/v1/files/streams/01kqsdrgdab2s7k2b7dkweg4p5.X6MIWqqjIET6j1s73eqHRmCYnl4L7sRJ"},"webhook":"https://example.com/hook","webhook_events_filter":["start","output","logs","completed"]}','pending',0,'2026-05-04 12:00:18.250000','2026-05-04 12:00:18.250000',NULL,NULL,NULL);
CREATE INDEX ix_secret_keys_owner ON secret_keys (owner);
CREATE INDEX ix_usage_account_id_completed_at ON usage (account_id, completed_at);
CREATE INDEX ix_user_versions_model_created_at ON user_versions (model, created_at);
CREATE INDEX ix_files_account_id_created_at_id ON files (account_id, created_at, id);
CREATE INDEX ix_files_expires_at ON files (expires_at);
CREATE INDEX ix_files_prediction_id ON files (prediction_id);
CREATE INDEX ix_files_sha256 ON files (sha256);
CREATE INDEX ix_predictions_account_id_created_at_id ON predictions (account_id, created_at, id);
CREATE INDEX ix_predictions_completed_at ON predictions (completed_at);
CREATE INDEX ix_predictions_model_created_at ON predictions (model, created_at);
CREATE INDEX ix_predictions_status_created_at ON predictions (status, created_at);
CREATE INDEX ix_events_prediction_id_seq ON events (prediction_id, seq);
CREATE INDEX ix_idempotency_keys_created_at ON idempotency_keys (created_at);
CREATE INDEX ix_webhooks_prediction_id_event_next_at ON webhooks (prediction_id, event, next_at);
CREATE INDEX ix_webhooks_state_next_at ON webhooks (state, next_at);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',9);
COMMIT;
